"""`heal_round`: sampling, breakpoints, repairs and PURE in one compiled program (DESIGN section 3).

A problems, N rollouts of each, U repair slots (problems that are repaired), F paths of each, R repairs of a path, P
tokens of a prompt, Q of a hint, T the most new tokens. Nothing that was computed is computed again: a prompt's keys and
values are held once for its rollouts, its paths and their repairs; what a path keeps is a cut of the cache that its
failed rollout was decoded with; the hint is read after it, once a path; and PURE reads the continuations alone, after
prompt and kept prefix without the hint, those alone that reached the answer.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax import gear
from heal_jax.config import GearSpec, PureSpec
from heal_jax.model.decoder import Decoder
from heal_jax.model.kv_cache import Cache, View, view
from heal_jax.model.mesh import constrain, parts_here
from heal_jax.pure import purity, scored_steps
from heal_jax.rollout.decode import Rollouts, decode, last_hidden, placed
from heal_jax.rollout.draw import typed
from heal_jax.rollout.sampling import Rule
from heal_jax.rollout.score import pick, pick_view, teacher_forced
from heal_jax.rollout.steps import Steps, find_steps


class Problems(NamedTuple):
    """What a round is given, all int32 but the keys [..., 2] uint32.

    prompt [A, P], prompt_length [A]; hint [A, Q], hint_length [A] >= 1; answer [A, L], answer_length [A]: the tokens of
    the right answer between grade.answer_open and grade.answer_close, with these, and answer_span [A, 2]: first and
    last + 1 of them that the answer itself overlaps; sample_keys, breakpoint_keys [A, N, 2]; repair_keys [A, N, R, 2],
    by the failed rollout; newlines: `NewlineTable`'s columns, each [V].
    """

    prompt: Array
    prompt_length: Array
    hint: Array
    hint_length: Array
    answer: Array
    answer_length: Array
    answer_span: Array
    sample_keys: Array
    breakpoint_keys: Array
    repair_keys: Array
    newlines: tuple[Array, ...]


class Round(NamedTuple):
    """What a round gives.

    base: A * N rollouts; correct, breakpoint, kept [A * N]: whether it stopped and holds the right answer's tokens, k*
    (gear.NONE where there is none) and the tokens kept of it. problem [U], parent [U * F] int32: the problem of each
    slot and the failed rollout of each path (among the A * N), -1 where there is none. repairs: U * F * R rollouts;
    repaired: those that are correct; logprob, entropy [U * F * R, T] float32 nats: the teacher's without the hint;
    score [U * F * R]: S of PURE, inf for repairs that are not correct.
    """

    base: Rollouts
    correct: Array
    breakpoint: Array
    kept: Array
    problem: Array
    parent: Array
    repairs: Rollouts
    repaired: Array
    logprob: Array
    entropy: Array
    score: Array


@dataclasses.dataclass(frozen=True)
class RoundSpec:
    """The static side of a round. Problems beyond gear.slots are left to the repair stage."""

    rules: tuple[Rule, ...]
    max_new: int
    gear: GearSpec
    pure: PureSpec


@partial(jax.jit, static_argnames=("graph", "spec"))
def heal_round(graph: nnx.GraphDef, params: nnx.State, problems: Problems, eos_ids: Array, *, spec: RoundSpec) -> Round:
    """One round of HEAL: see the module's text, `Problems`, `Round`.

    Answers are checked on token level and breakpoints are found on token ids, so the host, which has the text, has the
    last word on both. Caches are whole and in the model's dtype. Not for `gear.breakpoint: oracle`, nor for thinking
    parts, which only the text tells.
    """
    model, config = nnx.merge(graph, params), spec.gear
    (count, n), repairs = problems.sample_keys.shape[:2], problems.repair_keys.shape[2]
    parts = parts_here(count, config.slots)

    # Sample.
    hidden, cache = model.read(problems.prompt, problems.prompt_length)
    prompt = view(placed(cache, "context"))
    first = last_hidden(constrain(hidden, "context", None, None), problems.prompt_length)
    base, own = decode(
        model,
        jnp.repeat(first, n, axis=0),
        (prompt.repeat(n),),
        typed(problems.sample_keys),
        jnp.full(count * n, spec.max_new, jnp.int32),
        eos_ids,
        spec.rules,
        spec.max_new,
    )

    # Grade, and choose what to repair.
    span = _answer(base, problems.answer, problems.answer_length, problems.answer_span, n)
    correct = base.stopped & (span[:, 1] > 0)
    breakpoint, kept = _breakpoints(base, _steps(base, problems.newlines), problems.breakpoint_keys, config)
    failed = _first_distinct(base, correct, n)
    open_ = (jnp.sum(correct.reshape(count, n), axis=1) <= config.max_correct) & jnp.any(failed, axis=1)
    slot = _first_set(open_.reshape(parts, -1), config.slots // parts)  # [D, U / D], among the part's problems
    path = _first_set(pick(failed, jnp.maximum(slot, 0).reshape(-1), parts), config.paths)  # [U, F], of its N
    path = jnp.where(slot.reshape(-1, 1) < 0, -1, path)
    of_slot = jnp.maximum(slot, 0).reshape(-1)
    of_path = (of_slot[:, None] * n + jnp.maximum(path, 0)).reshape(-1)  # among the part's rollouts

    # Truncate: the cut of the rollout's own cache. Splice the hint in, once a path.
    length = jnp.where(path.reshape(-1) < 0, 0, pick(kept, of_path, parts))
    keys, values = jax.tree.map(lambda x: pick(x, of_path, parts), own[:2])
    cut = placed(Cache(keys, values, length), "context")
    before = pick_view(prompt, of_slot, parts).repeat(config.paths)
    prefix = view(cut, before)
    hint, hint_length = (
        jnp.repeat(pick(x, of_slot, parts), config.paths, 0) for x in (problems.hint, problems.hint_length)
    )
    hidden, cache = model.read(hint, hint_length, (before, prefix))
    shown = view(placed(cache, "context"), prefix)

    # Decode on.
    first = last_hidden(constrain(hidden, "context", None, None), hint_length)
    budget = jnp.where(path.reshape(-1) < 0, 0, spec.max_new - length)
    keys = pick(problems.repair_keys.reshape(count * n, repairs, 2), of_path, parts)
    repaired_by, _ = decode(
        model,
        jnp.repeat(first, repairs, axis=0),
        tuple(seen.repeat(repairs) for seen in (before, prefix, shown)),
        typed(keys),
        jnp.repeat(budget, repairs),
        eos_ids,
        spec.rules,
        spec.max_new,
    )

    # Score, without the hint, what reached the answer.
    answer, answer_length, answer_span = (
        pick(x, of_slot, parts) for x in (problems.answer, problems.answer_length, problems.answer_span)
    )
    span = _answer(repaired_by, answer, answer_length, answer_span, config.paths * repairs)
    repaired = repaired_by.stopped & (span[:, 1] > 0)
    last_prompt = jnp.take_along_axis(problems.prompt, problems.prompt_length[:, None] - 1, axis=1)[:, 0]
    failed_tokens = pick(base.tokens, of_path, parts)
    last_kept = jnp.take_along_axis(failed_tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    last = jnp.where(length > 0, last_kept, jnp.repeat(pick(last_prompt, of_slot, parts), config.paths))
    # The last token of the context is read again with each row, since it predicts the row's first.
    prefix = prefix._replace(last=jnp.maximum(prefix.last - 1, 0))
    before = before._replace(last=before.last - (length == 0))
    prefix = prefix._replace(start=before.end)
    logprob, entropy = _score_chosen(
        model, repaired_by.tokens, repaired, last, before, prefix, repairs, spec.pure, parts
    )
    whole = _spliced(failed_tokens, length, repaired_by, repairs)
    steps = _steps(whole, problems.newlines)
    offset = jnp.repeat(length, repairs)
    text_length = whole.length - whole.stopped
    index = scored_steps(steps.of_token, span + offset[:, None], offset, text_length)
    moved = (_shifted(x, offset) for x in (logprob, entropy))
    score = purity(*moved, index, spec.pure.epsilon, spec.pure.max_weight, steps=spec.max_new).score

    part_of = jnp.arange(parts)[:, None]
    problem = jnp.where(slot < 0, -1, slot + part_of * (count // parts)).reshape(-1)
    parent = jnp.where(path < 0, -1, problem[:, None] * n + path).reshape(-1)
    score = jnp.where(repaired, score, jnp.inf)
    return Round(base, correct, breakpoint, kept, problem, parent, repaired_by, repaired, logprob, entropy, score)


def _steps(rollouts: Rollouts, newlines: tuple[Array, ...]) -> Steps:
    return find_steps(newlines, rollouts.tokens, rollouts.length, rollouts.length - rollouts.stopped)


def _answer(rollouts: Rollouts, answer: Array, answer_length: Array, span: Array, times: int) -> Array:
    """Where each rollout last writes the answer: first and last + 1 of its tokens, [B, 2] int32; (0, 0) where it does
    not.

    answer [A, L], answer_length [A], span [A, 2] as in `Problems`, each for `times` rollouts.
    """
    answer, answer_length, span = (jnp.repeat(x, times, axis=0) for x in (answer, answer_length, span))
    rows, width = rollouts.tokens.shape
    at = jnp.arange(width)
    same = at + answer_length[:, None] <= rollouts.length[:, None]
    padded = jnp.pad(rollouts.tokens, ((0, 0), (0, answer.shape[1])), constant_values=-1)
    for i in range(answer.shape[1]):
        same &= (padded[:, i : i + width] == answer[:, i : i + 1]) | (i >= answer_length[:, None])
    last = jnp.max(jnp.where(same, at, -1), axis=1)
    return jnp.where(last[:, None] < 0, 0, last[:, None] + span)


def _breakpoints(rollouts: Rollouts, steps: Steps, keys: Array, spec: GearSpec) -> tuple[Array, Array]:
    """k* and kept tokens of each rollout, [B] int32 each."""
    most = rollouts.tokens.shape[1]
    h = gear.step_entropy(rollouts.entropy, steps.of_token, most)
    last = jnp.asarray(gear.last_candidate(most, spec.window))[steps.number]
    none = jnp.zeros_like(steps.number)
    k = gear.breakpoints(h, steps.number, last, keys.reshape(-1, 2), none, kind=spec.breakpoint, surge_kind=spec.surge)
    return k, gear.kept_tokens(steps.starts, k, backup=spec.backup)


def _first_distinct(rollouts: Rollouts, correct: Array, n: int) -> Array:
    """The failed rollouts of each problem that are not the same as an earlier failed one: [A, N] bool."""
    tokens = jnp.where(jnp.arange(rollouts.tokens.shape[1]) < rollouts.length[:, None], rollouts.tokens, -1)
    tokens, failed = tokens.reshape(-1, n, tokens.shape[1]), ~correct.reshape(-1, n)

    def compared(i: Array) -> Array:
        """Which rollouts equal the i-th of their problem: [A, N]."""
        return jnp.all(tokens == jax.lax.dynamic_index_in_dim(tokens, i, 1), axis=2)

    equal = jnp.moveaxis(jax.lax.map(compared, jnp.arange(n)), 0, 1)  # [A, N, N]
    earlier = jnp.tril(jnp.ones((n, n), bool), -1)
    return failed & ~jnp.any(equal & earlier & failed[:, None, :], axis=2)


def _first_set(flags: Array, most: int) -> Array:
    """Indices of the first `most` set flags of each row, -1 where there are fewer: [D, A] bool -> [D, most] int32."""
    number = jnp.cumsum(flags, axis=1) - 1
    hit = flags[:, None, :] & (number[:, None, :] == jnp.arange(most)[:, None])
    return jnp.where(jnp.any(hit, axis=2), jnp.argmax(hit, axis=2), -1).astype(jnp.int32)


def _spliced(base: Array, kept: Array, rollouts: Rollouts, times: int) -> Rollouts:
    """The rollouts with what was kept of their parents [B / times, T] before them."""
    base, kept = jnp.repeat(base, times, axis=0), jnp.repeat(kept, times)
    tokens = jnp.where(jnp.arange(base.shape[1]) < kept[:, None], base, _shifted(rollouts.tokens, kept))
    return rollouts._replace(tokens=tokens, length=rollouts.length + kept)


def _shifted(x: Array, by: Array) -> Array:
    """Row b moved by[b] places to the right, zeros before it: [B, T] -> [B, T]."""
    at = jnp.arange(x.shape[1]) - by[:, None]
    return jnp.where(at < 0, 0, jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1))


def _score_chosen(
    model: Decoder,
    tokens: Array,
    chosen: Array,
    last: Array,
    before: View,
    prefix: View,
    times: int,
    spec: PureSpec,
    parts: int,
) -> tuple[Array, Array]:
    """`teacher_forced` of the chosen rows, `spec.batch` at a time, as many times as there are rows for: [B, T] float32
    twice, 0 for the other rows. last [B / times]: token before a row's first; before, prefix: what a path sees."""
    rows = tokens.shape[0] // parts  # of a part
    batch = min(-(-spec.batch // parts), rows)
    order = jnp.argsort(~chosen.reshape(parts, rows), axis=1, stable=True)
    most = jnp.max(jnp.sum(chosen.reshape(parts, rows), axis=1))

    # A batch that begins near the end goes back over rows that were scored before.
    def score(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, logprob, entropy = state
        index = jax.lax.dynamic_slice_in_dim(order, start, batch, axis=1).reshape(-1)
        path = index // times
        views = tuple(pick_view(seen, path, parts) for seen in (before, prefix))
        new = teacher_forced(model, pick(last, path, parts), pick(tokens, index, parts), views)
        at = index.reshape(parts, batch)

        def put(old: Array, new: Array) -> Array:
            return jax.vmap(lambda old, i, new: old.at[i].set(new))(old, at, new.reshape(parts, batch, -1))

        return start + batch, put(logprob, new[0]), put(entropy, new[1])

    blank = jnp.zeros((parts, rows, tokens.shape[1]), jnp.float32)
    state = jax.lax.while_loop(lambda state: state[0] < most, score, (jnp.int32(0), blank, blank))
    logprob, entropy = (jnp.where(chosen[:, None], x.reshape(tokens.shape), 0.0) for x in state[1:])
    return logprob, entropy
