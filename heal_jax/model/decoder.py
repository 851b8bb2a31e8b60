"""The one decoder: embedding, pre-norm blocks with rotary grouped-query attention, gated MLP, output head.

Letters in shapes: B rows, T tokens of this call, S cache slots, D hidden, H query heads, K key-value heads,
G = H / K, E head dimension, V vocabulary. A token's cache slot is its position in the row, so a row is described by
one number, its length, and validity never depends on a token's id.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax.model.config import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    keys: one [B, K, E, S] array a layer (slots last: the product with one query then runs along memory, four times
    faster on a CPU); values: one [B, K, S, E] array a layer; length: [B] int32, tokens held by each row.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache with room for `slots` tokens in each of `rows` rows, nothing in it."""
    lead = (rows, config.num_kv_heads)
    keys = tuple(jnp.zeros((*lead, config.head_dim, slots), dtype) for _ in range(config.num_layers))
    values = tuple(jnp.zeros((*lead, slots, config.head_dim), dtype) for _ in range(config.num_layers))
    return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def repeat_rows(cache: Cache, times: int) -> Cache:
    """Each row `times` times in a row: [B, ...] -> [B * times, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Grouped-query attention with a float32 softmax.

    q [B, H, T, E], k [B, K, E, S], v [B, K, S, E], mask [B, T, S] bool (True: may be attended to)
    -> [B, H, T, E] in q's dtype.
    A query that may attend to nothing gets the mean of v, never a NaN.
    """
    b, h, t, e = q.shape
    kv_heads = k.shape[1]
    # Groups and queries share one axis, so that both products are plain batched matrix products.
    grouped = q.reshape(b, kv_heads, (h // kv_heads) * t, e)
    scores = jnp.einsum("bkne,bkes->bkns", grouped, k, preferred_element_type=jnp.float32) * e**-0.5
    scores = scores.reshape(b, kv_heads, h // kv_heads, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkns,bkse->bkne", weights.reshape(b, kv_heads, -1, weights.shape[-1]), v)
    return out.reshape(b, h, t, e)


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in transformers.

    x [B, heads, T, E], positions [B, T] int32 -> the same shape and dtype; angles in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _write(slots: Array, new: Array, start: Array, axis: int) -> Array:
    """Put new into slots along `axis` (of a row) from start[b] on; what would lie beyond the last slot is dropped.

    slots [B, K, E, S] or [B, K, S, E], new alike with T in place of S, start [B] int32.
    """

    def row(slots: Array, new: Array, start: Array) -> Array:
        at = start + jnp.arange(new.shape[axis])
        index = (slice(None),) * axis + (at,)
        return slots.at[index].set(new, mode="drop")

    return jax.vmap(row)(slots, new.astype(slots.dtype), start)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """x [..., size] -> the same shape and dtype; the mean square in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * wide.astype(x.dtype)


class Linear(nnx.Module):
    def __init__(self, size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, std: float):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (size_in, size_out), dtype))

    def __call__(self, x: Array) -> Array:
        """x [..., in] -> [..., out]."""
        return x @ self.kernel[...]


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs, std: float):
        c = config
        out_std = std / (2 * c.num_layers) ** 0.5  # residual branches start small (GPT-2)
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim, dtype, rngs, std)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, dtype, rngs, std)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, dtype, rngs, std)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, dtype, rngs, out_std)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.gate = Linear(c.hidden_size, c.intermediate_size, dtype, rngs, std)
        self.up = Linear(c.hidden_size, c.intermediate_size, dtype, rngs, std)
        self.down = Linear(c.intermediate_size, c.hidden_size, dtype, rngs, out_std)
        self.config = config

    def queries_keys_values(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [B, T, D] -> q [B, H, T, E], k [B, K, E, T], v [B, K, T, E]; q and k normalised (Qwen3) and rotated."""
        c = self.config

        def heads(y: Array, n: int) -> Array:
            return y.reshape(*y.shape[:2], n, c.head_dim).transpose(0, 2, 1, 3)

        q, k, v = heads(self.q(x), c.num_heads), heads(self.k(x), c.num_kv_heads), heads(self.v(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta).swapaxes(2, 3), v

    def __call__(
        self, x: Array, positions: Array, mask: Array, cached: tuple[Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [B, T, D], positions [B, T], mask [B, T, S] -> x [B, T, D] and the keys and values attended to."""
        q, k, v = self.queries_keys_values(self.attn_norm(x), positions)
        if cached is not None:
            k = _write(cached[0], k, positions[:, 0], axis=2)
            v = _write(cached[1], v, positions[:, 0], axis=1)
        mixed = attention(q, k, v, mask).transpose(0, 2, 1, 3)
        x = x + self.o(mixed.reshape(*x.shape[:2], -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), (k, v)


class Decoder(nnx.Module):
    """A causal language model. `rngs` seeds the initial weights (normal, `std`), which loading replaces."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype = jnp.float32, *, rngs: nnx.Rngs, std: float = 0.02):
        self.config = config
        self.embed = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.blocks = nnx.List([Block(config, dtype, rngs, std) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, dtype, rngs, std)

    def __call__(self, tokens: Array, segments: Array | None = None, positions: Array | None = None) -> Array:
        """Full pass without a cache: tokens [B, T] int32 -> hidden states [B, T, D] after the last norm.

        Rows are padded on the right; causality keeps padding out of what precedes it. With segments [B, T] int32 a
        token sees its own segment alone (packed rows; give positions [B, T] too).
        """
        b, t = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None, :]
        x = self.embed[...][tokens]
        for block in self.blocks:
            x, _ = block(x, positions, mask, None)
        return self.norm(x)

    def extend(self, tokens: Array, count: Array, cache: Cache) -> tuple[Array, Cache]:
        """Append a chunk to each row at the offset it has reached.

        tokens [B, T] int32 of which the first count[b] are real -> hidden [B, T, D] and the cache, count[b] longer.
        What lies beyond count[b] is written, never attended to, and overwritten by the next call.
        """
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        mask = jnp.arange(cache.keys[0].shape[3])[None, None, :] <= positions[:, :, None]
        x = self.embed[...][tokens]
        keys, values = [], []
        for block, k, v in zip(self.blocks, cache.keys, cache.values):
            x, (k, v) = block(x, positions, mask, (k, v))
            keys.append(k)
            values.append(v)
        return self.norm(x), Cache(tuple(keys), tuple(values), cache.length + count)

    def logits(self, hidden: Array) -> Array:
        """hidden [..., D] -> [..., V] float32."""
        kernel = self.embed[...].T if self.config.tie_embeddings else self.head.kernel[...]
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder taken apart for jit: `graph` is static (hashable), `params` a pytree of arrays."""

    graph: nnx.GraphDef
    params: nnx.State
    config: DecoderConfig


def abstract(config: DecoderConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a decoder, nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, rngs=nnx.Rngs(0))))


def initialise(config: DecoderConfig, seed: int, dtype: jnp.dtype = jnp.float32, std: float = 0.02) -> Model:
    """A decoder with random weights (normal, `std`), the same for the same seed."""
    graph, params = nnx.split(nnx.jit(lambda: Decoder(config, dtype, rngs=nnx.Rngs(seed), std=std))())
    return Model(graph, params, config)
