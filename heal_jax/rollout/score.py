"""Teacher-forced scores of texts after contexts that are computed once (what PURE needs).

A contexts of P tokens, B rows of T tokens, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax.model.decoder import Decoder
from heal_jax.model.kv_cache import View, view
from heal_jax.model.mesh import constrain, parts_here
from heal_jax.rollout.draw import entropy_of

CHUNK = 512  # positions whose logits are held at once


@partial(jax.jit, static_argnames="graph")
def score(
    graph: nnx.GraphDef, params: nnx.State, context: Array, context_length: Array, of_row: Array, tokens: Array
) -> tuple[Array, Array]:
    """Log-probability and entropy of every token of each row after its context, in one pass.

    context [A, P] int32 with context_length [A] >= 1; of_row [B] int32: the row's context, counted in its own part of
    the mesh; tokens [B, T] int32 -> logprob, entropy [B, T] float32 nats; entry t is of the distribution that predicts
    token t from the context and the tokens before it.
    """
    model = nnx.merge(graph, params)
    # The last token of a context is read again with each row: it predicts the row's first.
    cache = model.read(context, context_length - 1)[1]
    last = jnp.take_along_axis(context, (context_length - 1)[:, None], axis=1)[:, 0]
    seen, parts = view(cache), parts_here(context.shape[0], tokens.shape[0])
    return teacher_forced(model, pick(last, of_row, parts), tokens, (pick_view(seen, of_row, parts),))


def teacher_forced(model: Decoder, before: Array, tokens: Array, views: tuple[View, ...]) -> tuple[Array, Array]:
    """As `score`, of rows whose context but its last token, `before` [B] int32, is in `views`."""
    rows, length = tokens.shape
    shifted = jnp.concatenate([before[:, None], tokens[:, :-1]], axis=1)
    hidden, _ = model.read(shifted, jnp.full(rows, length, jnp.int32), views)
    parts = -(-length // CHUNK)
    chunk = -(-length // parts)  # equal parts: little padding
    pad = -length % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def part(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = constrain(model.logits(args[0]), "batch", None, "vocab")
        entropy, log_z = entropy_of(logits)
        return jnp.take_along_axis(logits, args[1][..., None], axis=-1)[..., 0] - log_z, entropy

    scored = jax.lax.map(part, (split(hidden), split(tokens)))
    logprob, entropy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in scored)
    return logprob, entropy


def pick(x: Array, index: Array, parts: int) -> Array:
    """Rows `index` [B] int32 of x [A, ...] -> [B, ...], each counted in its own one of `parts` equal parts of x."""
    split, at = x.reshape(parts, -1, *x.shape[1:]), index.reshape(parts, -1)
    return jax.vmap(lambda x, i: x[i])(split, at).reshape(-1, *x.shape[1:])


def pick_view(seen: View, index: Array, parts: int) -> View:
    """`pick` of the rows that see a cache, with a copy of what each of them sees."""
    times = seen.start.shape[0] // seen.cache.length.shape[0]
    cache = jax.tree.map(lambda x: pick(x, index // times, parts), seen.cache)
    return View(cache, *(pick(x, index, parts) for x in seen[1:]))
