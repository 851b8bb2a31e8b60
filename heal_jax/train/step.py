"""Loss and optimizer step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from heal_jax.model.layers import Remat
from heal_jax.model.mesh import constrain
from heal_jax.train.data import Batch

LOSS_CHUNK = 512  # positions whose logits are held at once: [8, 16k, 152k] of them would be 80 GB


def token_losses(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens: Array,
    segments: Array | None = None,
    positions: Array | None = None,
    *,
    remat: Remat = "none",
) -> Array:
    """Cross-entropy of each token given those before it, in packed rows those of its segment.

    tokens, segments, positions [B, T] int32 -> [B, T] float32 nats; entry t is the loss of token t. It says nothing of
    the first token of a row (0) or of a segment, which nothing predicts. remat: what the backward pass computes again,
    as beyond LOSS_CHUNK tokens it always does the logits.
    """
    model = nnx.merge(graph, params)
    targets = tokens[:, 1:]
    rows, length = targets.shape
    # The last token predicts nothing. In long rows it is computed all the same: see `score`.
    width = length + (length > LOSS_CHUNK)
    seen = (None if x is None else x[:, :width] for x in (tokens, segments, positions))
    hidden = constrain(model(*seen, remat=remat), "batch", None, None)[:, :length]

    def part(args: tuple[Array, Array]) -> Array:
        logits = constrain(model.logits(args[0]), "batch", None, "vocab")
        return optax.softmax_cross_entropy_with_integer_labels(logits, args[1])

    if length <= LOSS_CHUNK:
        losses = part((hidden, targets))
    else:
        pad = -length % LOSS_CHUNK
        hidden, targets = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
        chunks = [x.reshape(rows, -1, LOSS_CHUNK, *x.shape[2:]).swapaxes(0, 1) for x in (hidden, targets)]
        losses = jax.lax.map(jax.checkpoint(part), tuple(chunks)).swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jnp.pad(losses, ((0, 0), (1, 0)))


def loss_fn(
    params: nnx.State,
    graph: nnx.GraphDef,
    batch: Batch,
    count: Array | None = None,
    dtype: jnp.dtype | None = None,
    remat: Remat = "none",
    frozen: nnx.State | None = None,
) -> Array:
    """Sum of the losses of tokens whose mask is set over `count`, by default their number: a scalar. Weights are
    cast to `dtype` if given. frozen: those that do not learn, where `params` are not all (`heal_jax.model.lora`); they
    stay in their own.
    """
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if frozen is not None:
        frozen = jax.tree.map(lambda x: x, frozen)  # variables of this trace, which rematerialising asks for
        params = nnx.merge_state(params, frozen)
    losses = token_losses(graph, params, batch.tokens, batch.segments, batch.positions, remat=remat)
    return jnp.sum(losses * batch.mask) / (_learned(batch) if count is None else count)


def _learned(batch: Batch) -> Array:
    return jnp.maximum(jnp.sum(batch.mask), 1)


@partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "dtype", "shardings", "remat", "accumulate"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    opt_state: optax.OptState,
    batch: Batch,
    dtype: jnp.dtype | None = None,
    shardings: tuple[Sharding, ...] | None = None,
    remat: Remat = "none",
    accumulate: int = 1,
    frozen: nnx.State | None = None,
) -> tuple[nnx.State, optax.OptState, dict[str, Array]]:
    """One update on a batch of [B, T]. Metrics: loss (nats a learned token), grad_norm (scalars, float32).

    Where one of these is not finite, weights and moments stay as they were, and the step counts. dtype: what to compute
    in where it is not the weights' own (float32 weights, bfloat16 compute). shardings: of the leaves of (params,
    opt_state), to keep; left to itself the compiler moves some, and the next step compiles anew. remat: see
    `token_losses`. accumulate: parts that the rows are taken in, one after another, for less memory; the same sum.
    frozen: see `loss_fn`.
    """
    value_and_grad = jax.value_and_grad(loss_fn)
    if accumulate == 1:
        loss, grads = value_and_grad(params, graph, batch, None, dtype, remat, frozen)
    else:
        count = _learned(batch)

        def part(total: Any, rows: Batch) -> tuple[Any, None]:
            rows = jax.tree.map(lambda x: constrain(x, "batch", None), rows)
            here = value_and_grad(params, graph, rows, count, dtype, remat, frozen)
            return jax.tree.map(jnp.add, total, here), None

        # Every accumulate-th row: each device keeps its own.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1), batch)
        (loss, grads), _ = jax.lax.scan(part, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), parts)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, moved = optimizer.update(grads, opt_state, params)
    after = optax.apply_updates(params, updates), moved

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    params, opt_state = jax.tree.map(chosen, after, (params, opt_state))
    if shardings is not None:
        leaves, tree = jax.tree.flatten((params, opt_state))
        pinned = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(leaves, shardings, strict=True)]
        params, opt_state = jax.tree.unflatten(tree, pinned)
    return params, opt_state, {"loss": loss, "grad_norm": norm}
