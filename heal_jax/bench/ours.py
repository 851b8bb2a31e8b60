"""Our own side of the figures: the one place that calls the decode loop and the training step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from heal_jax.config import TrainSpec
from heal_jax.model.lm import LanguageModel
from heal_jax.rollout.decode import roll_out
from heal_jax.train.loop import optimizer
from heal_jax.train.step import train_step


def decode(lm: LanguageModel, prompts: np.ndarray, new: int) -> Callable[[int], jax.Array]:
    """prompts [B, P] int32 -> a function of a seed that samples `new` tokens a row, whatever they are: [B, new].

    With entropies and log-probabilities, as the pipeline decodes.
    """
    rows, width = prompts.shape
    context = jnp.asarray(prompts), jnp.full(rows, width, jnp.int32)
    none = jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
    budget, eos = jnp.full(rows, new, jnp.int32), jnp.asarray([-1], jnp.int32)

    def run(seed: int) -> jax.Array:
        keys = np.random.default_rng(seed).integers(2**32, size=(rows, 2), dtype=np.uint32)
        made = roll_out(
            lm.model.graph, lm.model.params, *context, *none, keys, budget, eos, rules=(), repeats=1, max_new=new
        )
        return made.tokens

    return run


def training(lm: LanguageModel, tokens: np.ndarray, spec: TrainSpec) -> Callable[[], jax.Array]:
    """tokens [B, T] int32, full rows -> a function that does one update of a copy of the weights; the loss."""
    transform = optimizer(spec, spec.steps)
    params = jax.tree.map(jnp.copy, lm.model.params)
    state = [params, jax.jit(transform.init)(params)]
    batch, mask = jnp.asarray(tokens), jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    dtype = jnp.dtype(jnp.float32)

    def run() -> jax.Array:
        *state[:], metrics = train_step(lm.model.graph, transform, state[0], state[1], batch, mask, dtype)
        jax.block_until_ready(state)
        return metrics["loss"]

    return run
