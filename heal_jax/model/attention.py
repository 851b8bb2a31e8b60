"""Grouped-query attention, in blocks of queries where there are many.

B rows, H query heads, K key-value heads, T queries, S key slots, E head dimension.
"""

import jax
import jax.numpy as jnp
from jax import Array

QUERY_BLOCK = 512  # queries whose scores are held at once: 16k tokens would need [16k, 16k] a head


def attention(
    q: Array,
    k: Array,
    v: Array,
    slots: Array,
    segments: tuple[Array, Array] | None = None,
    *,
    scale: float,
    window: int = 0,
) -> Array:
    """Causal attention with a float32 softmax.

    q [B, H, T, E], k [B, K, E, S], v [B, K, S, E], slots [B, T] int32: each query's own slot; it sees the slots up to
    that one, with a window > 0 the last `window` of them, and with segments ([B, T], [B, S]) int32 those of its own
    segment alone -> [B, H, T, E] in q's dtype. Beyond QUERY_BLOCK queries the scores are computed block by block (and
    again in the backward pass), so that memory grows with S and not with T * S.
    """
    if q.shape[2] <= QUERY_BLOCK:
        return _block(q, k, v, slots, segments, scale, window)
    count = q.shape[2]
    blocks = -(-count // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - count

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    own, others = (None, None) if segments is None else (split(segments[0], 1), segments[1])

    @jax.checkpoint
    def part(args: tuple[Array, Array, Array | None]) -> Array:
        q, slots, own = args
        return _block(q, k, v, slots, None if own is None or others is None else (own, others), scale, window)

    out = jnp.moveaxis(jax.lax.map(part, (split(q, 2), split(slots, 1), own)), 0, 2)
    return out.reshape(*q.shape[:2], blocks * QUERY_BLOCK, -1)[:, :, :count]


def _block(
    q: Array, k: Array, v: Array, slots: Array, segments: tuple[Array, Array] | None, scale: float, window: int
) -> Array:
    at = jnp.arange(k.shape[3])[None, None, :]
    mask = at <= slots[:, :, None]
    if window:
        mask &= at > slots[:, :, None] - window
    if segments is not None:
        mask &= segments[0][:, :, None] == segments[1][:, None, :]
    b, h, t, e = q.shape
    kv_heads = k.shape[1]
    # Groups and queries share one axis, so that both products are plain batched matrix products.
    grouped = q.reshape(b, kv_heads, (h // kv_heads) * t, e)
    scores = jnp.einsum("bkne,bkes->bkns", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(b, kv_heads, h // kv_heads, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)  # no NaN where all is masked
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkns,bkse->bkne", weights.reshape(b, kv_heads, -1, weights.shape[-1]), v)
    return out.reshape(b, h, t, e)
