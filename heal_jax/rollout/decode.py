"""The decode loop: one `lax.while_loop` that samples and records entropies.

B rows, T the most new tokens (static), V vocabulary. A row's randomness is a key of its own, folded with the number
of the token, so a rollout does not depend on its neighbours or its place in the batch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from heal_jax.model.decoder import Cache, Decoder, empty_cache, repeat_rows, with_slots
from heal_jax.model.mesh import constrain
from heal_jax.rollout.sampling import Rule, apply
from heal_jax.shapes import MADE_AT_ONCE


class Rollouts(NamedTuple):
    """What decoding records. tokens [B, T] int32; entropy, logprob, sampling_logprob [B, T] float32 (nats, one a
    decoded token; logprob of the raw distribution, sampling_logprob of the one drawn from); length [B] int32, the EOS
    included; stopped [B] bool: ended with an EOS. Entries at or beyond a row's length mean nothing.
    """

    tokens: Array
    entropy: Array
    logprob: Array
    sampling_logprob: Array
    length: Array
    stopped: Array


class State(NamedTuple):
    """Loop state: `logits` [B, V] float32 predict each row's next token; `active` [B] rows go on."""

    step: Array
    logits: Array
    cache: Cache
    active: Array
    out: Rollouts


def entropy_of(logits: Array) -> tuple[Array, Array]:
    """Entropy and log-normaliser of softmax(logits): [..., V] float32 -> ([...], [...]), nats.

    H = log Z - sum_v p_v * logit_v, without a second array of log-probabilities.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - peak
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    entropy = jnp.log(total) - jnp.sum(weights * shifted, axis=-1) / total
    return jnp.maximum(entropy, 0.0), jnp.log(total) + peak[..., 0]


def placed(cache: Cache, rows: str) -> Cache:
    """The cache split over the mesh: rows as logical axis `rows` says, and key-value heads."""

    def split(layers: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(constrain(x, rows, "kv_heads", None, None) for x in layers)

    return Cache(split(cache.keys), split(cache.values), constrain(cache.length, rows))


def decode(
    model: Decoder,
    cache: Cache,
    logits: Array,
    keys: Array,
    budget: Array,
    eos_ids: Array,
    rules: tuple[Rule, ...],
    max_new: int,
) -> Rollouts:
    """Decode every row until an EOS or its budget.

    cache: the context of each row; logits [B, V]: what predicts the first token; keys [B] typed PRNG keys; budget [B]
    int32 <= max_new; eos_ids [E] int32.
    """
    rows = logits.shape[0]
    blank = jnp.zeros((rows, max_new), jnp.float32)
    out = Rollouts(
        jnp.zeros((rows, max_new), jnp.int32), blank, blank, blank, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    )

    def condition(state: State) -> Array:
        return jnp.any(state.active)

    def step(state: State) -> State:
        entropy, log_z = entropy_of(state.logits)
        drawn_from = apply(rules, state.logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, state.step), logits.shape[1:]))(keys)
        token = jnp.argmax(drawn_from + noise, axis=-1).astype(jnp.int32)

        def of_token(values: Array) -> Array:
            return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]

        logprob = of_token(state.logits) - log_z
        sampling_logprob = of_token(drawn_from) - jax.nn.logsumexp(drawn_from, axis=-1) if rules else logprob
        old = state.out
        records = zip(old[:4], (token, entropy, logprob, sampling_logprob))
        tokens, entropies, logprobs, sampling = (
            jax.lax.dynamic_update_slice(array, new[:, None], (0, state.step)) for array, new in records
        )
        ended = jnp.any(token[:, None] == eos_ids, axis=1)
        length = old.length + state.active
        new = Rollouts(tokens, entropies, logprobs, sampling, length, old.stopped | (state.active & ended))
        active = state.active & ~ended & (length < budget)
        hidden, cache = model.extend(token[:, None], active.astype(jnp.int32), state.cache)
        following = constrain(model.logits(hidden[:, 0]), "batch", "vocab")
        return State(state.step + 1, following, placed(cache, "batch"), active, new)

    start = State(jnp.int32(0), constrain(logits, "batch", "vocab"), placed(cache, "batch"), budget > 0, out)
    return jax.lax.while_loop(condition, step, start).out


@partial(jax.jit, static_argnames=("graph", "rules", "repeats", "max_new", "slots"))
def roll_out(
    graph: nnx.GraphDef,
    params: nnx.State,
    context: Array,
    context_length: Array,
    hint: Array,
    hint_length: Array,
    keys: Array,
    budget: Array,
    eos_ids: Array,
    *,
    rules: tuple[Rule, ...],
    repeats: int,
    max_new: int,
    slots: int | None = None,
) -> Rollouts:
    """`repeats` rollouts of each context, which is computed once.

    context [A, P] int32 with context_length [A] (prompt and kept prefix); hint [A, Q] int32 with hint_length [A]
    follows it (Q = 0: none); keys [A * repeats, 2] uint32 and budget [A * repeats] int32, a context's rollouts
    together. slots: of the cache, at least each row's context, hint and budget (default: for the largest of each).
    Returns Rollouts with B = A * repeats.
    """
    model = nnx.merge(graph, params)
    width = context.shape[1] + hint.shape[1]
    slots = width + max_new if slots is None else slots
    # Room for many new tokens comes after the contexts are computed: else they would attend to it all, and contexts
    # that the mesh does not divide would hold it on every device. Little room is there from the start: no cache moves.
    first = width + max_new if width + max_new <= MADE_AT_ONCE else width
    cache = placed(empty_cache(model.config, context.shape[0], first, model.embed[...].dtype), "context")
    hidden, cache = model.extend(context, context_length, cache)
    last = _last(constrain(hidden, "context", None, None), context_length)
    if hint.shape[1]:
        hidden, cache = model.extend(hint, hint_length, cache)
        last = _last(constrain(hidden, "context", None, None), hint_length)
    logits = jnp.repeat(model.logits(last), repeats, axis=0)
    typed = jax.random.wrap_key_data(keys, impl="threefry2x32")
    cache = with_slots(repeat_rows(cache, repeats), max(first, slots))
    return decode(model, cache, logits, typed, budget, eos_ids, rules, max_new)


def _last(hidden: Array, count: Array) -> Array:
    """hidden [A, P, D], count [A] >= 1 -> the hidden state of each row's last real token, [A, D]."""
    return jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]


@partial(jax.jit, static_argnames=("graph", "chunk"))
def score(graph: nnx.GraphDef, params: nnx.State, tokens: Array, *, chunk: int = 512) -> tuple[Array, Array]:
    """Teacher-forced log-probability and entropy of every token: one pass, the vocabulary in chunks of positions.

    tokens [B, L] int32 -> logprob, entropy [B, L] float32 nats; entry t is of the distribution that predicts token t,
    entry 0 is 0.
    """
    model = nnx.merge(graph, params)
    # Not of tokens[:, :-1]: a TPU is slow with lengths that are no multiple of 8, and its compiler five times slower.
    hidden = constrain(model(tokens), "batch", None, None)[:, :-1]
    rows, length, width = hidden.shape
    parts = -(-tokens.shape[1] // chunk)
    chunk = -(-tokens.shape[1] // parts)  # equal parts: little padding
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad))).reshape(rows, -1, chunk).swapaxes(0, 1)

    def part(args: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = constrain(model.logits(args[0]), "batch", None, "vocab")
        entropy, log_z = entropy_of(logits)
        return jnp.take_along_axis(logits, args[1][..., None], axis=-1)[..., 0] - log_z, entropy

    logprob, entropy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in jax.lax.map(part, (hidden, targets)))
    return jnp.pad(logprob, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


def key_words(digest: bytes) -> np.ndarray:
    """The first eight bytes of a digest as PRNG key data: [2] uint32."""
    return np.frombuffer(digest[:8], dtype="<u4").copy()
