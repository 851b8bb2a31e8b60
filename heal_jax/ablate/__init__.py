"""heal ablate: what the parts of HEAL are worth, with the same rollouts, students, steps and held-out problems."""
