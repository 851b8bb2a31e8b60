"""heal_jax: hindsight entropy-assisted learning for reasoning distillation, in JAX."""

__version__ = "0.1.0"
