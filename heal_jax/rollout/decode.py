"""The decode loop: `lax.while_loop`s that sample, record entropies, and give the row of a finished rollout to the next.

B rows, T the most new tokens, P tokens of a context, V vocabulary. A rollout's randomness is a key of its own, folded
with the number of the token, so it does not depend on its row, its neighbours, or what its row held before.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from heal_jax.model.decoder import Decoder
from heal_jax.model.kv_cache import Cache, View, empty_cache, view
from heal_jax.model.mesh import constrain, parts_here
from heal_jax.rollout.draw import Drawn, draw, typed
from heal_jax.rollout.sampling import Rule
from heal_jax.shapes import in_view

# Names of the loops in the compiled program, for profiles and `heal plan`.
STEPS, READS, TURNS = "decode_steps", "read_contexts", "turns"


class Rollouts(NamedTuple):
    """What decoding records, of R rollouts. tokens [R, T] int32; entropy, logprob, sampling_logprob [R, T] float32
    (nats, one a decoded token; logprob of the raw distribution, sampling_logprob of the one drawn from); length [R]
    int32, the EOS included; stopped [R] bool: ended with an EOS; steps [] int32: of the loop, in which every row could
    have decoded a token. Entries at or beyond a rollout's length mean nothing.
    """

    tokens: Array
    entropy: Array
    logprob: Array
    sampling_logprob: Array
    length: Array
    stopped: Array
    steps: Array


def placed(cache: Cache, rows: str) -> Cache:
    """The cache split over the mesh: rows as logical axis `rows` says, and key-value heads."""
    keys, values = jax.tree.map(lambda x: constrain(x, rows, "kv_heads", None, None), cache[:2])
    return Cache(keys, values, constrain(cache.length, rows))


def last_hidden(hidden: Array, count: Array) -> Array:
    """hidden [A, P, D], count [A] >= 1 -> the hidden state of each row's last real token, [A, D]."""
    return jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]


def _blank(*shape: int) -> Rollouts:
    """Records [..., T] of rollouts of which there are none yet."""
    records, one = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.int32)
    return Rollouts(records.astype(jnp.int32), records, records, records, one, one > 0, jnp.int32(0))


def _draw(
    model: Decoder, hidden: Array, keys: Array, at: Array, eos_ids: Array, rules: tuple[Rule, ...]
) -> tuple[Drawn, Array]:
    """Token number at [B] of each row, from hidden [B, D], and whether it is an EOS."""
    logits = constrain(model.logits(hidden), "batch", "vocab")
    drawn = draw(logits, jax.vmap(jax.random.fold_in)(keys, at), rules)
    return drawn, jnp.any(drawn.token[:, None] == eos_ids, axis=1)


class _Rows(NamedTuple):
    """Loop state of `decode`: hidden [B, D] predicts the next token of each row; active [B] rows go on."""

    hidden: Array
    cache: Cache
    active: Array
    out: Rollouts


def decode(
    model: Decoder,
    hidden: Array,
    views: tuple[View, ...],
    keys: Array,
    budget: Array,
    eos_ids: Array,
    rules: tuple[Rule, ...],
    max_new: int,
    done: int = 0,
    eight_bit: bool = False,
) -> tuple[Rollouts, Cache]:
    """One rollout a row, until an EOS or its budget; all start together.

    hidden [B, D]: what predicts the first token; views: the context of each row; keys [B] typed PRNG keys; budget [B]
    int32 <= max_new; eos_ids [E] int32; done: tokens of each rollout that its context ends with, after which its draws
    are numbered; eight_bit: hold new keys and values in a byte a number. Returns B rollouts and the keys and values of
    what was decoded.
    """
    rows = hidden.shape[0]

    def step(state: _Rows) -> _Rows:
        old, active, at = state.out, state.active, state.out.steps
        drawn, ended = _draw(model, state.hidden, keys, jnp.full(rows, done + at), eos_ids, rules)
        records = [jax.lax.dynamic_update_slice(x, new[:, None], (0, at)) for x, new in zip(old, drawn)]
        new = Rollouts._make([*records, old.length + active, old.stopped | (active & ended), at + 1])
        hidden, cache = model.extend(drawn.token, state.cache, at, views)
        goes_on = active & ~ended & (new.length < budget)
        return _Rows(constrain(hidden, "row", "hidden"), placed(cache, "batch"), goes_on, new)

    own = placed(empty_cache(model.config, rows, max_new, jnp.int8 if eight_bit else hidden.dtype), "batch")
    start = _Rows(constrain(hidden, "row", "hidden"), own, budget > 0, _blank(rows, max_new))
    with jax.named_scope(STEPS):
        end = jax.lax.while_loop(lambda state: jnp.any(state.active), step, start)
    return end.out, end.cache._replace(length=end.out.length)


class _Queue(NamedTuple):
    """Loop state of `decode_queue`: G groups of M rows each, W contexts in view of a group, D parts of the mesh.

    Of rows [G, M]: rollout (its number among the part's), place (which context in view), at (tokens decoded), budget,
    active, keys [G, M, 2] uint32, hidden [G, M, Dm]. cache: of the rows. Of contexts in view [G, W]: context (its
    number in the part), started and stop (rollouts begun, and to begin: equal where all are, or nothing is there),
    length, first_hidden [G, W, Dm]; shared: their keys and values, W * P slots a group. loaded [D]: contexts taken so
    far. out: [D, Q * N, ...].
    """

    rollout: Array
    place: Array
    at: Array
    budget: Array
    active: Array
    keys: Array
    hidden: Array
    cache: Cache
    context: Array
    started: Array
    stop: Array
    length: Array
    first_hidden: Array
    shared: Cache
    loaded: Array
    out: Rollouts


def decode_queue(
    model: Decoder,
    context: Array,
    context_length: Array,
    keys: Array,
    budget: Array,
    eos_ids: Array,
    rules: tuple[Rule, ...],
    max_new: int,
    groups: int,
    members: int,
    done: int = 0,
    eight_bit: bool = False,
) -> Rollouts:
    """N rollouts of each context by fewer rows: the row of a finished rollout takes the next.

    context [Q, P] int32 with context_length [Q] (0: padding, after all others of its part of the mesh); keys [Q, N, 2]
    uint32, budget [Q, N] int32; done, eight_bit: as in `roll_out`. `groups` of `members` rows have up to two contexts
    in view each: while the last rollouts of one are decoded the rows that are done with it begin with the other, and
    when a row has nothing to begin, the next context is read; when there is none, the group takes over half of what
    another has not begun. Returns Q * N rollouts.
    """
    (count, width), n, dtype = context.shape, budget.shape[1], model.embed[...].dtype
    views, cache_dtype = in_view(n), jnp.int8 if eight_bit else dtype
    parts = parts_here(count, groups)
    of_part, per_part = count // parts, groups // parts  # contexts and groups

    def split(x: Array) -> Array:
        return constrain(x.reshape(parts, -1, *x.shape[1:]), "batch" if parts > 1 else None, *(None,) * x.ndim)

    context, context_length = split(context), split(context_length)
    keys, budget = split(keys.reshape(-1, 2)), split(budget.reshape(-1))
    there = jnp.sum(context_length > 0, axis=1)

    def room(state: _Queue) -> tuple[Array, Array, Array]:
        """Groups [D, G / D] with an idle row, nothing to begin, and room for more that there is; what is free [G, W];
        the largest number of rollouts that a group has not begun, [D, G / D * W] one-hot."""
        at_work = state.active[:, :, None] & (state.place[:, :, None] == jnp.arange(views))
        waiting = state.stop - state.started
        free = (waiting == 0) & ~jnp.any(at_work, axis=1)
        wants = jnp.all(waiting == 0, axis=1) & jnp.any(free, axis=1) & ~jnp.all(state.active, axis=1)
        waiting = waiting.reshape(parts, -1)
        is_more = (state.loaded < there) | (jnp.max(waiting, axis=1) > 1)
        most = jnp.arange(per_part * views) == jnp.argmax(waiting, axis=1)[:, None]
        return wants.reshape(parts, per_part) & is_more[:, None], free, most

    def load(state: _Queue) -> _Queue:
        """Read the next context of each part for the first of its groups that has room."""
        wants, free, most = room(state)
        chosen = (jnp.arange(per_part) == jnp.argmax(wants, axis=1)[:, None]) & wants
        place = jnp.arange(views) == jnp.argmax(free, axis=1)[:, None]
        here = chosen.reshape(groups, 1) & place  # [G, W]
        shares = jnp.any(wants, axis=1) & (state.loaded >= there)  # parts without a new one

        def of_most(x: Array) -> Array:
            return jnp.sum(jnp.where(most, x.reshape(parts, -1), 0), axis=1)

        stop = of_most(state.stop)
        middle = stop - (stop - of_most(state.started)) // 2
        number = jnp.where(shares, of_most(state.context), jnp.minimum(state.loaded, of_part - 1))
        given = (most & shares[:, None]).reshape(groups, views)  # who gives up half
        tokens, length = (jax.vmap(lambda x, i: x[i])(x, number) for x in (context, context_length))
        hidden, fresh = model.read(tokens, length)
        fresh = fresh.eight_bit() if eight_bit else fresh

        def spread(x: Array) -> Array:
            """Of a part [D, ...] -> of its groups [G, ...]."""
            return jnp.repeat(x, per_part, axis=0)

        def put(old: Array, new: Array, axis: int) -> Array:
            """new [D, K, ..., P, ...] into one of the W stretches of P slots of old, where `here`."""
            shape = old.shape
            old = old.reshape(*shape[:axis], views, width, *shape[axis + 1 :])
            where = jnp.expand_dims(here, [i for i in range(1, old.ndim) if i != axis])
            return jnp.where(where, jnp.expand_dims(spread(new), axis), old).reshape(shape)

        first = spread(last_hidden(constrain(hidden, "context", None, None), length))
        return state._replace(
            context=jnp.where(here, spread(number)[:, None], state.context),
            started=jnp.where(here, spread(jnp.where(shares, middle, 0))[:, None], state.started),
            stop=jnp.where(
                here,
                spread(jnp.where(shares, stop, n))[:, None],
                jnp.where(given, spread(middle)[:, None], state.stop),
            ),
            length=jnp.where(here, spread(length)[:, None], state.length),
            first_hidden=constrain(
                jnp.where(here[:, :, None], first[:, None], state.first_hidden), "row", None, "hidden"
            ),
            shared=placed(
                Cache(
                    jax.tree.map(partial(put, axis=3), state.shared.keys, fresh.keys),
                    jax.tree.map(partial(put, axis=2), state.shared.values, fresh.values),
                    state.shared.length,
                ),
                "context",
            ),
            loaded=state.loaded + (jnp.any(wants, axis=1) & ~shares),
        )

    def begin(state: _Queue) -> _Queue:
        """Give idle rows the next rollouts of what their group has in view."""
        place = jnp.argmax(state.started < state.stop, axis=1)  # there is at most one

        def of_place(x: Array) -> Array:
            return jnp.take_along_axis(x, place.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)

        started = of_place(state.started)
        number = started + jnp.cumsum(~state.active, axis=1) - 1
        begins = ~state.active & (number < of_place(state.stop))
        rollout = jnp.where(begins, of_place(state.context) * n + number, state.rollout)

        def of_rollout(x: Array) -> Array:
            return jax.vmap(lambda x, i: x[i])(x, rollout.reshape(parts, -1)).reshape(groups, members, *x.shape[2:])

        limit = jnp.where(begins, of_rollout(budget), state.budget)
        begun = jnp.sum(begins, axis=1, keepdims=True) * (jnp.arange(views) == place[:, None])
        return state._replace(
            rollout=rollout,
            place=jnp.where(begins, place[:, None], state.place),
            at=jnp.where(begins, 0, state.at),
            budget=limit,
            active=(state.active | begins) & (limit > 0),
            keys=jnp.where(begins[:, :, None], of_rollout(keys), state.keys),
            hidden=jnp.where(begins[:, :, None], of_place(state.first_hidden), state.hidden),
            started=state.started + begun,
        )

    def step(state: _Queue) -> _Queue:
        state = begin(state)
        at, active = state.at.reshape(-1), state.active.reshape(-1)
        hidden = state.hidden.reshape(groups * members, -1)
        drawn, ended = _draw(model, hidden, typed(state.keys), done + at, eos_ids, rules)
        # Rows without a rollout write nowhere.
        target = jnp.where(active, state.rollout.reshape(-1), of_part * n).reshape(parts, -1)
        when = at.reshape(parts, -1)

        def record(x: Array, new: Array) -> Array:
            new = new.reshape(parts, -1)
            if x.ndim == 2:
                return jax.vmap(lambda x, i, new: x.at[i].set(new, mode="drop"))(x, target, new)
            return jax.vmap(lambda x, i, t, new: x.at[i, t].set(new, mode="drop"))(x, target, when, new)

        records = [record(x, new) for x, new in zip(state.out, (*drawn, at + 1, ended))]
        out = Rollouts._make([*records, state.out.steps + 1])
        place = state.place.reshape(-1)
        length = jnp.take_along_axis(state.length, state.place, axis=1).reshape(-1)
        seen = View(state.shared, jnp.zeros_like(place), place * width, place * width + length)
        hidden, cache = model.extend(drawn.token, state.cache, at, (seen,))
        goes_on = active & ~ended & (at + 1 < state.budget.reshape(-1))
        return state._replace(
            at=(at + 1).reshape(groups, members),
            active=goes_on.reshape(groups, members),
            hidden=constrain(hidden, "row", "hidden").reshape(groups, members, -1),
            cache=placed(cache, "batch"),
            out=out,
        )

    def to_load(state: _Queue) -> Array:
        return jnp.any(room(state)[0])

    def to_decode(state: _Queue) -> Array:
        return jnp.any(state.active) | jnp.any(state.started < state.stop)

    def turn(state: _Queue) -> _Queue:
        with jax.named_scope(READS):
            state = jax.lax.while_loop(to_load, load, state)
        with jax.named_scope(STEPS):
            return jax.lax.while_loop(lambda state: to_decode(state) & ~to_load(state), step, state)

    of_rows = jnp.zeros((groups, members), jnp.int32)
    of_views = jnp.zeros((groups, views), jnp.int32)
    size = model.config.hidden_size
    state = _Queue(
        rollout=of_rows,
        place=of_rows,
        at=of_rows,
        budget=of_rows,
        active=of_rows > 0,
        keys=jnp.zeros((groups, members, 2), jnp.uint32),
        hidden=jnp.zeros((groups, members, size), dtype),
        cache=placed(empty_cache(model.config, groups * members, max_new, cache_dtype), "batch"),
        context=of_views,
        started=of_views,
        stop=of_views,
        length=of_views,
        first_hidden=jnp.zeros((groups, views, size), dtype),
        shared=placed(empty_cache(model.config, groups, views * width, cache_dtype), "context"),
        loaded=jnp.zeros(parts, jnp.int32),
        out=_blank(parts, of_part * n, max_new),
    )
    with jax.named_scope(TURNS):
        end = jax.lax.while_loop(lambda state: to_load(state) | to_decode(state), turn, state)
    return Rollouts._make([*(x.reshape(-1, *x.shape[2:]) for x in end.out[:6]), end.out.steps])


@partial(jax.jit, static_argnames=("graph", "rules", "max_new", "groups", "members", "done", "eight_bit"))
def roll_out(
    graph: nnx.GraphDef,
    params: nnx.State,
    context: Array,
    context_length: Array,
    keys: Array,
    budget: Array,
    eos_ids: Array,
    *,
    rules: tuple[Rule, ...],
    max_new: int,
    groups: int,
    members: int,
    done: int = 0,
    eight_bit: bool = False,
) -> Rollouts:
    """N rollouts of each of Q contexts, each context computed and held once.

    context [Q, P] int32 with context_length [Q]; keys [Q, N, 2] uint32 and budget [Q, N] int32. With groups * members =
    Q * N rows all rollouts are decoded at once, with fewer one after another (`decode_queue`); done: as in `decode`;
    eight_bit: hold all keys and values in a byte a number. Returns Q * N rollouts.
    """
    model = nnx.merge(graph, params)
    count, n = budget.shape
    if groups * members < count * n:
        queue = context, context_length, keys, budget
        return decode_queue(model, *queue, eos_ids, rules, max_new, groups, members, done, eight_bit)
    hidden, cache = model.read(context, context_length)
    last = last_hidden(constrain(hidden, "context", None, None), context_length)
    seen = view(placed(cache.eight_bit() if eight_bit else cache, "context")).repeat(n)
    rows = jnp.repeat(last, n, axis=0), (seen,), typed(keys), budget.reshape(-1)
    return decode(model, *rows, eos_ids, rules, max_new, done, eight_bit)[0]


def key_words(digest: bytes) -> np.ndarray:
    """The first eight bytes of a digest as PRNG key data: [2] uint32."""
    return np.frombuffer(digest[:8], dtype="<u4").copy()
