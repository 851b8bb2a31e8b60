"""Attention of many queries without their scores in memory: fused kernels where a device has them.

B rows, H query heads, K key-value heads, T tokens, E head dimension. On TPU splash attention, jax's kernel after
FlashAttention-2 (Dao, arXiv 2307.08691), which also skips blocks that causality or the window masks; on NVIDIA GPUs
cuDNN's; elsewhere, and where a kernel does not take the sizes, `attention`, which is the reference for both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from heal_jax.model.attention import Level, attention
from heal_jax.model.mesh import spec

LANES = 128  # of a TPU's registers: blocks of queries and keys are multiples
BLOCK = 512  # queries and keys of a block at most: what of a head is on the chip at once


def full_attention(
    q: Array, k: Array, v: Array, segments: Array | None = None, *, scale: float, window: int = 0
) -> Array:
    """Causal attention of rows to themselves: token t sees those up to t, with a window > 0 the last `window` of them,
    with segments [B, T] int32 those of its own segment alone.

    q [B, H, T, E], k [B, K, E, T], v [B, K, T, E] -> [B, H, T, E] in q's dtype; scores and softmax in float32. Under a
    mesh rows are split as contexts are, and heads.
    """
    branches: dict[str, Any] = {}
    if takes_splash(q.dtype, q.shape[2]):
        branches["tpu"] = functools.partial(_split, _splash, scale=scale, window=window)
    if takes_cudnn(q, segments):
        branches["cuda"] = functools.partial(_split, _cudnn, scale=scale, window=window)
    plain = functools.partial(_plain, scale=scale, window=window)
    if not branches:
        return plain(q, k, v, segments)
    return jax.lax.platform_dependent(q, k, v, segments, **branches, default=plain)


def takes_splash(dtype: jnp.dtype, tokens: int) -> bool:
    """Whether TPUs compute a row of so many tokens in the kernel: bfloat16 alone (its backward pass would multiply
    float32 in one pass of the matrix unit), and enough for a block of the smallest size."""
    return dtype == jnp.bfloat16 and tokens >= LANES


def takes_cudnn(q: Array, segments: Array | None) -> bool:
    """Whether this machine's GPUs compute these queries in cuDNN: it knows segments only as a [T, T] bias a row."""
    half, size = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[3]
    return half and size <= 128 and size % 8 == 0 and segments is None and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Whether there are GPUs for cuDNN's attention (Ampere or later). Without any it cannot even be traced."""
    try:
        return float(jax.local_devices(backend="cuda")[0].compute_capability) >= 8
    except RuntimeError:
        return False


def _plain(q: Array, k: Array, v: Array, segments: Array | None, *, scale: float, window: int) -> Array:
    slots = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
    first = jnp.zeros_like(slots) if segments is None else _segment_starts(segments)
    first = jnp.maximum(first, slots - window + 1) if window else first
    seen = (jnp.broadcast_to(x, (q.shape[0], q.shape[2])) for x in (first, slots + 1))
    return attention(q, [Level(k, v, *seen)], scale=scale)


def _segment_starts(segments: Array) -> Array:
    """[B, T] int32, equal within a segment, which is one run -> the first slot of each token's segment, [B, T]
    int32."""
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins, at, 0), axis=1)


def _split(kernel: Any, q: Array, k: Array, v: Array, segments: Array | None, *, scale: float, window: int) -> Array:
    """A kernel on each device's rows and heads of the mesh in use, if there is one."""
    kernel = functools.partial(kernel, scale=scale, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segments)
    heads = spec(mesh, ("context", "heads", None, None), q.shape)
    kv_heads = spec(mesh, ("context", "kv_heads", None, None), k.shape)
    rows = None if segments is None else PartitionSpec(heads[0], None)
    specs = (heads, kv_heads, kv_heads, rows)
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments)


def block_size(tokens: int) -> int:
    """Queries and keys of a block: as few blocks as BLOCK allows, and little padding."""
    count = -(-tokens // BLOCK)
    return -(-tokens // (count * LANES)) * LANES


def scores(tokens: int, window: int = 0) -> int:
    """How many scores of a row's tokens with each other splash attention computes a head: of whole blocks, without
    those that are masked altogether."""
    size = block_size(tokens)
    blocks = -(-tokens // size)
    most = min(blocks, 1 + -(-(window - 1) // size)) if window else blocks  # that a block of queries meets
    return (most * (most + 1) // 2 + (blocks - most) * most) * size**2


def _splash(
    q: Array, k: Array, v: Array, segments: Array | None, *, scale: float, window: int, interpret: bool = False
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, size = q.shape[2], block_size(q.shape[2])
    padded = tokens + -tokens % size

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))

    shape = (padded, padded)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    blocks = splash.BlockSizes(*(size,) * 8)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[1]), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    ids = None
    if segments is not None:  # what comes after the row is seen by nothing in it, and sees itself: no sum is zero
        after = jnp.pad(segments, ((0, 0), (0, padded - tokens)))
        ids = splash.SegmentIds(after, after)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel knows no scale
    out = jax.vmap(kernel)(pad(q), pad(k.swapaxes(2, 3)), pad(v), ids)
    return out[:, :, :tokens]


def _cudnn(
    q: Array, k: Array, v: Array, segments: None, *, scale: float, window: int, implementation: Any = "cudnn"
) -> Array:
    q, k, v = q.swapaxes(1, 2), k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)
    near = (window - 1, 0) if window else None
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=near, implementation=implementation
    )
    return out.swapaxes(1, 2)
