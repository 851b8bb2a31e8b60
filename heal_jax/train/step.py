"""Loss and optimizer step."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from heal_jax.model.mesh import constrain

LOSS_CHUNK = 512  # positions whose logits are held at once: [8, 16k, 152k] of them would be 80 GB


def token_losses(graph: nnx.GraphDef, params: nnx.State, tokens: Array, *, remat: bool = False) -> Array:
    """Cross-entropy of each token given those before it.

    tokens [B, T] int32 -> [B, T] float32 nats; entry t is the loss of token t, entry 0 is 0 (nothing predicts it).
    remat: compute the blocks again in the backward pass, as beyond LOSS_CHUNK tokens the logits always are.
    """
    model = nnx.merge(graph, params)
    targets = tokens[:, 1:]
    rows, length = targets.shape
    # The last token predicts nothing. In long rows it is computed all the same: see `score`.
    seen = tokens if length > LOSS_CHUNK else tokens[:, :-1]
    hidden = constrain(model(seen, remat=remat), "batch", None, None)[:, :length]

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
    tokens: Array,
    loss_mask: Array,
    dtype: jnp.dtype | None = None,
    remat: bool = False,
) -> Array:
    """Mean loss over the tokens whose mask [B, T] bool is set: a scalar. Weights are cast to `dtype` if given."""
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    losses = token_losses(graph, params, tokens, remat=remat)
    return jnp.sum(losses * loss_mask) / jnp.maximum(jnp.sum(loss_mask), 1)


@partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "dtype", "shardings", "remat"),
    donate_argnames=("params", "opt_state"),
)
def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    opt_state: optax.OptState,
    tokens: Array,
    loss_mask: Array,
    dtype: jnp.dtype | None = None,
    shardings: tuple[Sharding, ...] | None = None,
    remat: bool = False,
) -> tuple[nnx.State, optax.OptState, dict[str, Array]]:
    """One update on tokens [B, T] int32 with loss_mask [B, T] bool. Metrics: loss, grad_norm (scalars, float32).

    dtype: what to compute in where it is not the weights' own (float32 weights, bfloat16 compute). shardings: of the
    leaves of (params, opt_state), to keep; left to itself the compiler moves some, and the next step compiles anew.
    remat: see `token_losses`.
    """
    loss, grads = jax.value_and_grad(loss_fn)(params, graph, tokens, loss_mask, dtype, remat)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    params = optax.apply_updates(params, updates)
    if shardings is not None:
        leaves, tree = jax.tree.flatten((params, opt_state))
        pinned = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(leaves, shardings, strict=True)]
        params, opt_state = jax.tree.unflatten(tree, pinned)
    return params, opt_state, metrics
