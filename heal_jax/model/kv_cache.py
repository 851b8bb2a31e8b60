"""Keys and values of tokens seen so far, and what rows see of them.

B rows, K key-value heads, E head dimension, S slots. A row's tokens lie in one or more caches, one after another: those
it shares with other rows (`View`) and its own. In each a token's slot is its place, so a row is described by lengths,
and validity never depends on a token's id.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from heal_jax.model.config import DecoderConfig


class EightBit(NamedTuple):
    """Keys or values in a byte a number: `whole` int8 times `step` float32, one step a token and head.

    Keys [B, K, E, S] with steps [B, K, 1, S], values [B, K, S, E] with steps [B, K, S, 1].
    """

    whole: Array
    step: Array


Held = Array | EightBit


class Cache(NamedTuple):
    """keys: one [B, K, E, S] array a layer (slots last: the product with one query then runs along memory, four times
    faster on a CPU); values: one [B, K, S, E] array a layer; length: [B] int32, tokens held by each row.
    """

    keys: tuple[Held, ...]
    values: tuple[Held, ...]
    length: Array

    def eight_bit(self) -> "Cache":
        """The same, each number rounded to one of 255 steps from minus to plus the largest of its token and head."""
        keys = jax.tree.map(functools.partial(eight_bit, axis=2), self.keys)
        return Cache(keys, jax.tree.map(functools.partial(eight_bit, axis=3), self.values), self.length)


def eight_bit(x: Array, axis: int) -> EightBit:
    """Round [B, K, ...]; axis: that of E."""
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return EightBit(jnp.round(x / jnp.where(step > 0, step, 1)).astype(jnp.int8), step)


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache with room for `slots` tokens in each of `rows` rows, nothing in it; dtype: int8 for `EightBit`."""
    lead = (rows, config.num_kv_heads)

    def empty(*shape: int, steps: tuple[int, ...]) -> Held:
        numbers = jnp.zeros((*lead, *shape), dtype)
        return EightBit(numbers, jnp.zeros((*lead, *steps), jnp.float32)) if dtype == jnp.int8 else numbers

    keys = tuple(empty(config.head_dim, slots, steps=(1, slots)) for _ in range(config.num_layers))
    values = tuple(empty(slots, config.head_dim, steps=(slots, 1)) for _ in range(config.num_layers))
    return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def bytes_per_slot(config: DecoderConfig, dtype: jnp.dtype) -> int:
    """Of a row, all layers together; dtype: as in `empty_cache`."""
    each = config.head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == jnp.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * each


class View(NamedTuple):
    """What B rows see of a cache of R rows, which B / R adjacent ones share each, and which stays as it is.

    start [B] int32: position of the first token seen; first, last [B] int32: the slots first <= s < last are seen.
    """

    cache: Cache
    start: Array
    first: Array
    last: Array

    @property
    def end(self) -> Array:
        """[B] int32: position of what comes after it."""
        return self.start + self.last - self.first

    def repeat(self, times: int) -> "View":
        """The same cache, shared by `times` as many rows."""
        return View(self.cache, *(jnp.repeat(x, times) for x in self[1:]))


def view(cache: Cache, before: View | None = None) -> View:
    """Each row's own cache, all of it; `before`: what the rows see before it."""
    zero = jnp.zeros_like(cache.length)
    return View(cache, zero if before is None else before.end, zero, cache.length)


def after(views: tuple[View, ...], rows: int) -> Array:
    """Position of what follows the views: [B, 1] int32."""
    return views[-1].end[:, None] if views else jnp.zeros((rows, 1), jnp.int32)


def write(held: Held, new: Array, at: Array, axis: int) -> Held:
    """Put the keys or values of one token a row into `held` [B, ..., S, ...] along `axis`, at slot `at` (a scalar, or
    [B] int32: each row's own); `new` alike with 1 in place of S. Beyond the last slot nothing is written.
    """

    def put(slots: Array, new: Array) -> Array:
        new = new.astype(slots.dtype)
        if at.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, at, axis)

        def row(slots: Array, new: Array, at: Array) -> Array:
            index = (slice(None),) * (axis - 1) + (at[None],)
            return slots.at[index].set(new, mode="drop")

        return jax.vmap(row)(slots, new, at)

    return jax.tree.map(put, held, eight_bit(new, 5 - axis) if isinstance(held, EightBit) else new)
