"""Decoding with entropies: sampling rules, the loop, steps on token ids, teacher-forced scores."""
