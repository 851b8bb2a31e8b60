"""Grouped-query attention, in blocks of queries where there are many, over keys that several rows may share.

B rows, H query heads, K key-value heads, T queries, S key slots, E head dimension.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from heal_jax.model.kv_cache import EightBit, Held

QUERY_BLOCK = 512  # queries whose scores are held at once: 16k tokens would need [16k, 16k] a head


class Level(NamedTuple):
    """Keys and values that are held once for B / R rows of queries each.

    keys [R, K, E, S], values [R, K, S, E]; query t of row b sees the slots first[b, t] <= s < last[b, t] of cache row
    b // (B / R). first, last [B, T] int32.
    """

    keys: Held
    values: Held
    first: Array
    last: Array


def attention(q: Array, levels: Sequence[Level], *, scale: float) -> Array:
    """Softmax attention over the slots of all levels together, in float32.

    q [B, H, T, E] -> [B, H, T, E] in q's dtype. Each level's part of the softmax is computed by itself, for all rows
    that share its keys in one product, and the parts are merged by their log-sum-exp (Hydragen, arXiv 2402.05099;
    bifurcated attention, arXiv 2403.08845): exact, and no key is copied. Every query must see at least one slot. Beyond
    QUERY_BLOCK queries the scores are computed block by block (and again in the backward pass), so that memory grows
    with S and not with T * S.
    """
    if q.shape[2] <= QUERY_BLOCK:
        return _block(q, levels, scale)
    count = q.shape[2]
    blocks = -(-count // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - count

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def part(args: tuple[Array, tuple[tuple[Array, Array], ...]]) -> Array:
        q, seen = args
        return _block(q, [level._replace(first=a, last=z) for level, (a, z) in zip(levels, seen)], scale)

    seen = tuple((split(level.first, 1), split(level.last, 1)) for level in levels)
    out = jnp.moveaxis(jax.lax.map(part, (split(q, 2), seen)), 0, 2)
    return out.reshape(*q.shape[:2], blocks * QUERY_BLOCK, -1)[:, :, :count]


def _block(q: Array, levels: Sequence[Level], scale: float) -> Array:
    if len(levels) == 1:
        return _mix(jax.nn.softmax(_scores(q, levels[0], scale), axis=-1), levels[0].values, q).astype(q.dtype)
    # Of each level: the largest score, the sum of exponentials over it, and the values weighted by them.
    peaks, sums, mixed = [], [], []
    for level in levels:
        scores = _scores(q, level, scale)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        mixed.append(_mix(weights, level.values, q))
        peaks.append(_by_row(peak, q.shape))
        sums.append(_by_row(jnp.sum(weights, axis=-1, keepdims=True), q.shape))
    top = jnp.max(jnp.stack(peaks), axis=0)
    shares = [jnp.exp(peak - top) for peak in peaks]  # 0 for a level of which a query sees nothing
    total = functools.reduce(jnp.add, (share * s for share, s in zip(shares, sums)))
    return (functools.reduce(jnp.add, (share * m for share, m in zip(shares, mixed))) / total).astype(q.dtype)


def _scores(q: Array, level: Level, scale: float) -> Array:
    """[R, K, m, G, T, S] float32 (m = B / R rows that share keys), the lowest number where a slot is not seen.

    Rows, groups and queries share one axis, so that both products are plain batched matrix products.
    """
    keys, steps = _times_steps(level.keys, q.dtype)
    (b, h, t, e), (r, k) = q.shape, keys.shape[:2]
    m, g = b // r, h // k
    grouped = q.reshape(r, m, k, g, t, e).swapaxes(1, 2).reshape(r, k, m * g * t, e)
    scores = jnp.einsum("rkne,rkes->rkns", grouped, keys, preferred_element_type=jnp.float32) * (scale * steps)
    at = jnp.arange(keys.shape[3])
    seen = (at >= level.first[:, :, None]) & (at < level.last[:, :, None])
    scores = scores.reshape(r, k, m, g, t, -1)
    # Not -inf: no NaN where all is masked.
    return jnp.where(seen.reshape(r, 1, m, 1, t, -1), scores, jnp.finfo(jnp.float32).min)


def _mix(weights: Array, values: Held, q: Array) -> Array:
    """weights [R, K, m, G, T, S], values [R, K, S, E] -> [B, H, T, E] float32, the shape of q."""
    r, k, m, g, t, s = weights.shape
    numbers, steps = _times_steps(values, q.dtype)
    flat = weights.reshape(r, k, m * g * t, s) * jnp.swapaxes(steps, -1, -2)
    out = jnp.einsum("rkns,rkse->rkne", flat.astype(q.dtype), numbers, preferred_element_type=jnp.float32)
    return _by_row(out.reshape(r, k, m, g, t, -1), q.shape)


def _times_steps(held: Held, dtype: jnp.dtype) -> tuple[Array, Array]:
    """What to multiply with in `dtype`, and the float32 steps of its slots, which scale scores or weights instead."""
    if isinstance(held, EightBit):
        return held.whole.astype(dtype), held.step
    return held, jnp.ones((1, 1), jnp.float32)


def _by_row(x: Array, shape: tuple[int, ...]) -> Array:
    """[R, K, m, G, T, X] -> [B, H, T, X]."""
    b, h, t, _ = shape
    return x.swapaxes(1, 2).reshape(b, h, t, -1)
