"""Loss and optimizer step."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array


def token_losses(graph: nnx.GraphDef, params: nnx.State, tokens: Array) -> Array:
    """Cross-entropy of each token given those before it.

    tokens [B, T] int32 -> [B, T] float32 nats; entry t is the loss of token t, entry 0 is 0 (nothing predicts it).
    """
    model = nnx.merge(graph, params)
    logits = model.logits(model(tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.pad(losses, ((0, 0), (1, 0)))


def loss_fn(params: nnx.State, graph: nnx.GraphDef, tokens: Array, loss_mask: Array) -> Array:
    """Mean loss over the tokens whose mask [B, T] bool is set: a scalar."""
    losses = token_losses(graph, params, tokens)
    return jnp.sum(losses * loss_mask) / jnp.maximum(jnp.sum(loss_mask), 1)


@partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("params", "opt_state"))
def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    opt_state: optax.OptState,
    tokens: Array,
    loss_mask: Array,
) -> tuple[nnx.State, optax.OptState, dict[str, Array]]:
    """One update on tokens [B, T] int32 with loss_mask [B, T] bool. Metrics: loss, grad_norm (scalars, float32)."""
    loss, grads = jax.value_and_grad(loss_fn)(params, graph, tokens, loss_mask)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics
