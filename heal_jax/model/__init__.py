"""Decoder-only language models in flax.nnx, read from and written to Hugging Face folders."""
