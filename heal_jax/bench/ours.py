"""Our own side of the figures: the one place that calls the compiled programs, and what they do less well without."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from heal_jax.config import TrainSpec
from heal_jax.model.kv_cache import Cache, view
from heal_jax.model.lm import LanguageModel
from heal_jax.rollout.decode import Rollouts, decode, last_hidden, roll_out
from heal_jax.rollout.draw import typed
from heal_jax.rollout.score import score, teacher_forced
from heal_jax.train.data import Batch
from heal_jax.train.loop import optimizer
from heal_jax.train.step import train_step

NO_EOS = np.asarray([-1], np.int32)


def keys_of(seed: int, contexts: int, each: int) -> np.ndarray:
    """[contexts, each, 2] uint32."""
    return np.random.default_rng(seed).integers(2**32, size=(contexts, each, 2), dtype=np.uint32)


def sampling(
    lm: LanguageModel, prompts: np.ndarray, each: int, new: int, *, eight_bit: bool = False
) -> Callable[[int], Rollouts]:
    """prompts [A, P] int32 -> a function of a seed that samples `each` rollouts of `new` tokens of each prompt.

    With entropies and log-probabilities, as the pipeline decodes; a prompt is read and held once.
    """
    budget = np.full((len(prompts), each), new, np.int32)
    return in_turn(lm, prompts, budget, len(prompts), each, eight_bit=eight_bit)


def in_turn(
    lm: LanguageModel, prompts: np.ndarray, budget: np.ndarray, groups: int, members: int, *, eight_bit: bool = False
) -> Callable[[int], Rollouts]:
    """The same of budget [A, N] int32 tokens each, by `groups` of `members` rows."""
    (count, width), each = prompts.shape, budget.shape[1]
    arrays = jnp.asarray(prompts), jnp.full(count, width, jnp.int32)
    static = {"rules": (), "max_new": int(budget.max()), "groups": groups, "members": members, "eight_bit": eight_bit}

    def run(seed: int) -> Rollouts:
        keys = keys_of(seed, count, each)
        return roll_out(lm.model.graph, lm.model.params, *arrays, keys, jnp.asarray(budget), NO_EOS, **static)

    return run


def sampling_alone(lm: LanguageModel, prompts: np.ndarray, each: int, new: int) -> Callable[[int], Array]:
    """The same for the tokens alone: what the compiler then leaves out is what recording costs."""
    count, width = prompts.shape
    context = jnp.asarray(prompts), jnp.full(count, width, jnp.int32)
    budget = jnp.full((count, each), new, jnp.int32)

    @partial(jax.jit, static_argnames="graph")
    def tokens(graph: nnx.GraphDef, params: nnx.State, keys: Array) -> Array:
        static = {"rules": (), "max_new": new, "groups": count, "members": each}
        return roll_out(graph, params, *context, keys, budget, NO_EOS, **static).tokens

    return lambda seed: tokens(lm.model.graph, lm.model.params, keys_of(seed, count, each))


def reading_each(lm: LanguageModel, prompts: np.ndarray, each: int, new: int) -> Callable[[int], Rollouts]:
    """The same with every prompt read anew for each of its rollouts."""
    return sampling(lm, np.repeat(prompts, each, axis=0), 1, new)


def after_prompt(
    lm: LanguageModel, prompt: np.ndarray, each: int, new: int, *, copies: bool
) -> Callable[[int], Rollouts]:
    """prompt [1, P] int32, read beforehand -> a function of a seed that decodes `each` rollouts of `new` tokens after
    it.

    copies: with a copy of the prompt's keys and values for each of them.
    """
    hidden, cache = _read(lm.model.graph, lm.model.params, jnp.asarray(prompt))
    if copies:
        cache = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), cache)

    def run(seed: int) -> Rollouts:
        return _decoded(lm.model.graph, lm.model.params, hidden, cache, keys_of(seed, each, 1)[:, 0], new=new)

    return run


@partial(jax.jit, static_argnames="graph")
def _read(graph: nnx.GraphDef, params: nnx.State, tokens: Array) -> tuple[Array, Cache]:
    length = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    hidden, cache = nnx.merge(graph, params).read(tokens, length)
    return last_hidden(hidden, length), cache


@partial(jax.jit, static_argnames=("graph", "new"))
def _decoded(graph: nnx.GraphDef, params: nnx.State, hidden: Array, cache: Cache, keys: Array, *, new: int) -> Rollouts:
    """keys [B, 2] uint32; hidden [1, D], cache of one row or of B -> B rollouts."""
    rows, model = keys.shape[0], nnx.merge(graph, params)
    seen = view(cache).repeat(rows // cache.length.shape[0])
    first, budget = jnp.repeat(hidden, rows, axis=0), jnp.full(rows, new, jnp.int32)
    return decode(model, first, (seen,), typed(keys), budget, jnp.asarray(NO_EOS), (), new)[0]


def scoring(lm: LanguageModel, contexts: np.ndarray, texts: np.ndarray, each: int) -> Callable[[], tuple[Array, Array]]:
    """contexts [A, P], texts [A * each, T] int32 -> log-probabilities and entropies of the texts, each context read
    once."""
    of_row = np.repeat(np.arange(len(contexts), dtype=np.int32), each)
    length = np.full(len(contexts), contexts.shape[1], np.int32)
    arrays = tuple(map(jnp.asarray, (contexts, length, of_row, texts)))
    return lambda: score(lm.model.graph, lm.model.params, *arrays)


def scoring_whole(
    lm: LanguageModel, contexts: np.ndarray, texts: np.ndarray, each: int
) -> Callable[[], tuple[Array, Array]]:
    """The same of the whole sequences from nothing."""
    whole = jnp.asarray(np.concatenate([np.repeat(contexts, each, axis=0), texts], axis=1))
    return lambda: scored_whole(lm.model.graph, lm.model.params, whole)


@partial(jax.jit, static_argnames="graph")
def scored_whole(graph: nnx.GraphDef, params: nnx.State, tokens: Array) -> tuple[Array, Array]:
    """tokens [B, L] -> of all but the first, [B, L - 1]."""
    return teacher_forced(nnx.merge(graph, params), tokens[:, 0], tokens[:, 1:], ())


def training(lm: LanguageModel, tokens: np.ndarray, spec: TrainSpec) -> Callable[[], jax.Array]:
    """tokens [B, T] int32, full rows -> a function that does one update of a copy of the weights; the loss."""
    transform = optimizer(spec, spec.steps)
    params = jax.tree.map(jnp.copy, lm.model.params)
    state = [params, jax.jit(transform.init)(params)]
    batch = Batch(jnp.asarray(tokens), None, None, jnp.ones(tokens.shape, bool).at[:, 0].set(False))
    dtype = jnp.dtype(jnp.float32)

    def run() -> jax.Array:
        *state[:], metrics = train_step(lm.model.graph, transform, state[0], state[1], batch, dtype)
        jax.block_until_ready(state)
        return metrics["loss"]

    return run
