"""The one decoder: embedding, pre-norm blocks with rotary grouped-query attention, gated MLP, output head.

Letters in shapes: B rows, T tokens of this call, S cache slots, D hidden, H query heads, K key-value heads,
G = H / K, E head dimension, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax.model.attention import Level, attention
from heal_jax.model.config import DecoderConfig
from heal_jax.model.experts import Experts
from heal_jax.model.kernels import full_attention
from heal_jax.model.kv_cache import Cache, Held, View, after, write
from heal_jax.model.layers import Remat, in_turn
from heal_jax.model.mesh import constrain
from heal_jax.model.rope import rotate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467); Gemma scales by 1 + weight, in float32."""

    def __init__(self, size: int, config: DecoderConfig, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros(size, dtype) if config.gemma else jnp.ones(size, dtype))
        self.eps, self.gemma = config.rms_norm_eps, config.gemma

    def __call__(self, x: Array) -> Array:
        """x [..., size] -> the same shape and dtype; the mean square in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.gemma:
            return (wide * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return self.weight[...] * wide.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
    """x [..., in] times kernel [in, out] -> [..., out], in `dtype` if given; float32 stays float32 both ways.

    Its gradient is spelt out for the CPU compiler's sake, which else writes the transposed operand of the gradient of
    the kernel in the loop that makes it: strided, and slower than the product itself.
    """
    return jnp.matmul(x, kernel, precision=_precision(kernel), preferred_element_type=dtype)


def _precision(kernel: Array) -> jax.lax.Precision | None:
    """float32 means float32: left to themselves GPUs multiply such matrices in TF32 and TPUs in bfloat16."""
    return jax.lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else None


def _product_forward(x: Array, kernel: Array, dtype: jnp.dtype | None) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype: jnp.dtype | None, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    times = functools.partial(jax.lax.dot_general, precision=_precision(kernel), preferred_element_type=dtype)
    lead = tuple(range(x.ndim - 1))

    def plain(x: Array, dy: Array) -> Array:
        return times(x, dy, ((lead, lead), ((), ())))

    def apart(x: Array, dy: Array) -> Array:
        x, dy = jax.lax.optimization_barrier((x, dy))  # the transposition becomes a pass of its own
        if dy.shape[-1] < x.shape[-1]:  # of the narrower operand
            return times(dy, x, ((lead, lead), ((), ()))).T
        return times(x, dy, ((lead, lead), ((), ())))

    of_x = times(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    of_kernel = jax.lax.platform_dependent(x, dy, cpu=apart, default=plain)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    lora_a: nnx.Param
    lora_b: nnx.Param

    def __init__(
        self, size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, std: float, *, bias: bool = False
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (size_in, size_out), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(size_out, dtype))
        self.has_bias = bias
        self.adapter_scale: float | None = None  # without it there are no lora_a and lora_b: `heal_jax.model.lora`

    def __call__(self, x: Array) -> Array:
        """x [..., in] -> [..., out]."""
        y = product(x, self.kernel[...])
        if self.adapter_scale is not None:
            y = y + product(self.adapter_scale * product(x, self.lora_a[...]), self.lora_b[...])
        return y + self.bias[...] if self.has_bias else y


class MLP(nnx.Module):
    """Gated MLP (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs, std: float, out_std: float):
        c = config
        self.gate = Linear(c.hidden_size, c.intermediate_size, dtype, rngs, std, bias=c.mlp_bias)
        self.up = Linear(c.hidden_size, c.intermediate_size, dtype, rngs, std, bias=c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, dtype, rngs, out_std, bias=c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs, std: float):
        c = config
        out_std = std / (2 * c.num_layers) ** 0.5  # residual branches start small (GPT-2)
        norm = functools.partial(RMSNorm, config=c, dtype=dtype)
        self.attn_norm = norm(c.hidden_size)
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim, dtype, rngs, std, bias=c.qkv_bias)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, dtype, rngs, std, bias=c.qkv_bias)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, dtype, rngs, std, bias=c.qkv_bias)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, dtype, rngs, out_std, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)
        if c.gemma:
            self.post_attn_norm, self.post_mlp_norm = norm(c.hidden_size), norm(c.hidden_size)
        self.mlp_norm = norm(c.hidden_size)
        if c.has_experts(layer):
            sizes = c.hidden_size, c.expert_size, c.experts, c.experts_per_token
            activation = ACTIVATIONS[c.activation]
            self.experts = Experts(*sizes, c.normalise_experts, activation, dtype, rngs, std)
        else:
            self.mlp = MLP(c, dtype, rngs, std, out_std)
        self.config, self.layer = config, layer

    def queries_keys_values(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [B, T, D] -> q [B, H, T, E], k [B, K, E, T], v [B, K, T, E]; q and k normalised (qk_norm) and rotated."""
        c, rope = self.config, self.config.layer_rope(self.layer)

        def heads(y: Array, n: int) -> Array:
            return y.reshape(*y.shape[:2], n, c.head_dim).transpose(0, 2, 1, 3)

        q, k, v = heads(self.q(x), c.num_heads), heads(self.k(x), c.num_kv_heads), heads(self.v(x), c.num_kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, rope), rotate(k, positions, rope).swapaxes(2, 3), v

    def __call__(
        self,
        x: Array,
        positions: Array,
        slots: Array,
        segments: Array | None = None,
        cached: tuple[Held, Held] | None = None,
        views: Sequence[tuple[Held, Held, View]] = (),
    ) -> tuple[Array, tuple[Held, Held]]:
        """x [B, T, D], positions and slots [B, T] or [1, T] int32 -> x [B, T, D], and the rows' own keys and values.

        Without `cached` these are the T tokens'; with it (T = 1) they are written into it at `slots`. views: keys and
        values of this layer that precede them.
        """
        c, window = self.config, self.config.layer_window(self.layer)
        q, k, v = self.queries_keys_values(self.attn_norm(x), positions)
        scale, own = c.query_scale**-0.5, tuple[Held, Held]((k, v))
        if cached is None and not views:
            mixed = full_attention(q, k, v, segments, scale=scale, window=window)
        else:
            if cached is not None:
                at = slots[0, 0] if slots.shape[0] == 1 else slots[:, 0]
                own = write(cached[0], k, at, axis=3), write(cached[1], v, at, axis=2)
            rows = x.shape[:2]

            def level(keys: Held, values: Held, first: Array, last: Array, back: Array) -> Level:
                """`back`: the slot that each query's own token has or would have there, for the sliding window."""
                first = jnp.maximum(first, back - window + 1) if window else first
                return Level(keys, values, jnp.broadcast_to(first, rows), jnp.broadcast_to(last, rows))

            levels = []
            for keys, values, seen in views:
                back = positions - (seen.start - seen.first)[:, None]
                levels.append(level(keys, values, seen.first[:, None], seen.last[:, None], back))
            levels.append(level(*own, jnp.zeros_like(slots), slots + 1, slots))
            # As the caches are split: the compiler may else gather them, to have the rows of `x`.
            split = "context", "heads", None, None
            mixed = constrain(attention(constrain(q, *split), levels, scale=scale), *split)
        mixed = self.o(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        x = x + (self.post_attn_norm(mixed) if c.gemma else mixed)
        y = self.mlp_norm(x)
        y = self.experts(y) if c.has_experts(self.layer) else self.mlp(y)
        return x + (self.post_mlp_norm(y) if c.gemma else y), own


class Decoder(nnx.Module):
    """A causal language model. `rngs` seeds the initial weights (normal, `std`), which loading replaces."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: jnp.dtype = jnp.float32,
        *,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ):
        self.config = config
        self.embed = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.blocks = nnx.List([Block(config, i, dtype, rngs, std) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config, dtype)
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, dtype, rngs, std)

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        """float32 means float32: left to themselves GPUs multiply such matrices in TF32 and TPUs in bfloat16."""
        float32 = self.embed[...].dtype == jnp.float32
        return jax.default_matmul_precision("highest") if float32 else contextlib.nullcontext()

    def _embed(self, tokens: Array) -> Array:
        """tokens [B, T] int32 -> [B, T, D]."""
        # As the table lies: the compiler else puts the rows of all devices on each before it splits them.
        x = constrain(self.embed[...][tokens], "row", None, "hidden")
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.gemma else x

    def __call__(
        self, tokens: Array, segments: Array | None = None, positions: Array | None = None, *, remat: Remat = "none"
    ) -> Array:
        """Full pass without a cache: tokens [B, T] int32 -> hidden states [B, T, D] after the last norm.

        Rows are padded on the right; causality keeps padding out of what precedes it. With segments [B, T] int32 a
        token sees its own segment alone (packed rows; give positions [B, T] too).
        remat: what the backward pass computes again.
        """
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        positions = slots if positions is None else positions
        # Rows stay split between blocks: left alone the compiler splits hidden over fsdp and repeats the attention.
        x = constrain(self._embed(tokens), "context", None, None)

        def apply(block: Block, x: Array) -> Array:
            return constrain(block(x, positions, slots, segments)[0], "context", None, None)

        with self._precision():
            x = in_turn(apply, self.blocks, self.config, x, remat)
        return self.norm(x)

    def read(self, tokens: Array, count: Array, views: tuple[View, ...] = ()) -> tuple[Array, Cache]:
        """A full pass over what follows `views` in each row, and its keys and values.

        tokens [B, T] int32 of which the first count[b] are real -> hidden [B, T, D] and a cache of T slots.
        """
        slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = after(views, tokens.shape[0]) + slots
        x = constrain(self._embed(tokens), "context", None, None)
        keys, values = [], []
        with self._precision():
            for i, block in enumerate(self.blocks):
                x, (k, v) = block(x, positions, slots, views=_layer(views, i))
                x = constrain(x, "context", None, None)
                keys.append(k)
                values.append(v)
        return self.norm(x), Cache(tuple(keys), tuple(values), count)

    def extend(self, tokens: Array, cache: Cache, at: Array, views: tuple[View, ...] = ()) -> tuple[Array, Cache]:
        """One more token a row, which takes slot `at` of the row's own cache (int32: one for all rows, or [B]).

        tokens [B] int32 -> hidden [B, D] and the cache; its lengths are the caller's to count.
        """
        slots = jnp.atleast_1d(at)[:, None]
        positions = jnp.broadcast_to(after(views, tokens.shape[0]) + slots, (tokens.shape[0], 1))
        x = self._embed(tokens[:, None])
        keys, values = [], []
        with self._precision():
            for i, block in enumerate(self.blocks):
                x, (k, v) = block(x, positions, slots, None, (cache.keys[i], cache.values[i]), _layer(views, i))
                # With rows split over fsdp instead, each step would gather the weights.
                x = constrain(x, "row", None, "hidden")
                keys.append(k)
                values.append(v)
        return self.norm(x)[:, 0], Cache(tuple(keys), tuple(values), cache.length)

    def logits(self, hidden: Array) -> Array:
        """hidden [..., D] -> [..., V] float32."""
        kernel = self.embed[...].T if self.config.tie_embeddings else self.head.kernel[...]
        with self._precision():
            return product(hidden, kernel, jnp.float32)


def _layer(views: tuple[View, ...], layer: int) -> list[tuple[Held, Held, View]]:
    return [(view.cache.keys[layer], view.cache.values[layer], view) for view in views]


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
