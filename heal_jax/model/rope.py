"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways of stretching it to longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Base frequency and scaling.

    kind: default (none); linear (positions divided by `factor`: position interpolation, arXiv 2306.15595); llama3
    (Llama 3.1: long wave lengths divided by `factor`, a smooth passage between `low` and `high`); yarn (arXiv
    2309.00071: a ramp over the dimensions between `beta_slow` and `beta_fast` rotations). `original`: positions of
    pretraining. `attention`: factor on cosine and sine (yarn).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention: float = 1.0


def frequencies(rope: Rope, head_dim: int) -> Array:
    """Radians a position, of each pair of dimensions: [head_dim / 2] float32."""
    half = head_dim // 2
    base = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        turns = rope.original * base / (2 * math.pi)  # over the original context
        share = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return base * ((1 - share) / rope.factor + share)
    if rope.kind == "yarn":
        return base * (1 - _yarn_ramp(rope, head_dim) * (1 - 1 / rope.factor))
    raise ValueError(f"rope kind {rope.kind!r}")


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """0 where a dimension keeps its frequency, 1 where it is interpolated: [head_dim / 2] float32."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    return np.clip((np.arange(head_dim // 2) - first) / width, 0, 1).astype(np.float32)


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """Rotate queries or keys; half-split layout, as in transformers.

    x [B, heads, T, E], positions [B, T] int32 -> the same shape and dtype; angles in float32.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention != 1.0:
        cos, sin = cos * rope.attention, sin * rope.attention
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
