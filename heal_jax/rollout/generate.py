"""From contexts to rollouts: padding, buckets, fixed batches, device and back."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from heal_jax.config import SampleSpec
from heal_jax.errors import InputError
from heal_jax.model.lm import LanguageModel, Rollout
from heal_jax.model.mesh import batch_parts, parts_of, put_batch, using
from heal_jax.processes import fetch
from heal_jax.rollout.decode import key_words, roll_out
from heal_jax.rollout.sampling import Rule, rules
from heal_jax.rollout.score import score
from heal_jax.rollout.steps import find_steps
from heal_jax.shapes import ScoreShape, Shape, at_once, bucket, with_caches
from heal_jax.strict import check


@dataclasses.dataclass(frozen=True)
class Group:
    """Rollouts that share a context (with its hint): ids seed their randomness; budget bounds the new tokens of
    each."""

    context: tuple[int, ...]
    rollout_ids: tuple[str, ...]
    budget: int


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One rollout on the host: tokens [n] int32, entropy, logprob, sampling_logprob [n] float32."""

    rollout_id: str
    tokens: np.ndarray
    entropy: np.ndarray
    logprob: np.ndarray
    sampling_logprob: np.ndarray
    finish: str

    def followed_by(self, more: "Decoded") -> "Decoded":
        """With the tokens of the same rollout that come after it."""

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(more, name)])

        records = joined("tokens"), joined("entropy"), joined("logprob"), joined("sampling_logprob")
        return Decoded(self.rollout_id, *records, more.finish)


def key_of(name: str) -> np.ndarray:
    """The PRNG key of whatever has this name: [2] uint32."""
    return key_words(hashlib.sha256(name.encode()).digest())


def pad_rows(rows: Sequence[Sequence[int]], width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [count, width] int32 and lengths [count] int32; rows beyond the given ones are empty."""
    tokens, length = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        length[i] = len(row)
    return tokens, length


def dealt(shape: Shape, parts: int) -> tuple[Shape, np.ndarray]:
    """The shape of the program over `parts` parts of a mesh, and the place of each of the shape's contexts in it.

    It has as many contexts as the parts divide; one goes to each part in turn, so that all have the same work to the
    end. Groups of rows that the parts do not divide become as large as a part allows, or, where each has one row, as
    many as they divide: what they share is else whole in every part.
    """
    unit = parts // math.gcd(parts, shape.repeats if shape.at_once else 1)
    count = -(-shape.contexts // unit) * unit
    groups, members = (count if shape.at_once else shape.groups), shape.members
    if not shape.at_once and groups % parts and shape.rows % parts == 0:
        rows = shape.rows // parts
        members = max(size for size in range(1, min(rows, shape.repeats) + 1) if rows % size == 0)
        groups = shape.rows // members
    elif not shape.at_once and shape.repeats == 1:
        groups = max(1, groups // parts) * parts
    split = parts_of(parts, count, groups)
    order = np.arange(count)
    over = dataclasses.replace(shape, contexts=count, groups=groups, members=members)
    return over, order % split * (count // split) + order // split


def batch_arrays(groups: Sequence[Group], shape: Shape, parts: int) -> tuple[np.ndarray, ...]:
    """What `roll_out` is given by context, over `parts` parts of a mesh.

    context [Q, P], context_length [Q], keys [Q, N, 2], budget [Q, N]; Q and each group's place as `dealt` says.
    """
    over, order = dealt(shape, parts)
    count = over.contexts
    context, length = np.zeros((count, shape.context_length), np.int32), np.zeros(count, np.int32)
    keys, budget = np.zeros((count, shape.repeats, 2), np.uint32), np.zeros((count, shape.repeats), np.int32)
    for i, group in zip(order, groups):
        context[i, : len(group.context)], length[i] = group.context, len(group.context)
        for j, rollout_id in enumerate(group.rollout_ids):
            keys[i, j] = key_of(rollout_id)
            budget[i, j] = min(group.budget, shape.max_new)
    return context, length, keys, budget


def generate(lm: LanguageModel, groups: Sequence[Group], shape: Shape, rules: tuple[Rule, ...]) -> list[list[Decoded]]:
    """Decode a shard: at most shape.contexts groups of shape.repeats rollouts -> the rollouts of each group.

    By the programs of `Shape.legs`; reading a rollout's first tokens again is how vLLM, too, goes on with what
    lost its cache (Kwon et al., arXiv 2309.06180, 4.5).
    """
    first, *longer = shape.legs()
    made = _decode(lm, groups, first, rules)
    for leg in longer:
        left = [
            (i, j)
            for i, (group, several) in enumerate(zip(groups, made))
            for j, d in enumerate(several)
            if d.finish == "length" and len(d.tokens) < group.budget
        ]
        if not left:
            break
        rest = [
            Group(
                groups[i].context + tuple(map(int, made[i][j].tokens)),
                (made[i][j].rollout_id,),
                groups[i].budget - len(made[i][j].tokens),
            )
            for i, j in left
        ]
        for (i, j), (more,) in zip(left, _decode(lm, rest, leg, rules)):
            made[i][j] = made[i][j].followed_by(more)
    return made


def _decode(lm: LanguageModel, groups: Sequence[Group], shape: Shape, rules: tuple[Rule, ...]) -> list[list[Decoded]]:
    """One program's rollouts of each group, to at most shape.max_new tokens."""
    parts = batch_parts(lm.mesh)
    over, order = dealt(shape, parts)
    with using(lm.mesh):
        out = roll_out(
            lm.model.graph,
            lm.model.params,
            *put_batch(lm.mesh, batch_arrays(groups, shape, parts), "context"),
            lm.eos_ids,
            rules=rules,
            **over.static,
        )
    tokens, entropy, logprob, sampling, length, stopped, _ = fetch(out)

    def decoded(row: int, rollout_id: str) -> Decoded:
        n = int(length[row])
        finish = "stop" if stopped[row] else "length"
        return Decoded(rollout_id, tokens[row, :n], entropy[row, :n], logprob[row, :n], sampling[row, :n], finish)

    return [
        [decoded(i * shape.repeats + j, rollout_id) for j, rollout_id in enumerate(group.rollout_ids)]
        for i, group in zip(order, groups)
    ]


def rollouts(
    lm: LanguageModel, prompts: Sequence[str | Sequence[int]], spec: SampleSpec, seed: int
) -> list[list[Rollout]]:
    """`spec.n` rollouts of each prompt (text or token ids). Raises InputError; see `LanguageModel.generate`."""
    check(spec, "")
    ids = [lm.tokenizer.prompt(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
    if not ids:
        return []
    width, config = bucket(max(map(len, ids))), lm.model.config
    if not all(ids) or min(map(min, ids)) < 0 or max(map(max, ids)) >= config.vocab_size:
        raise InputError(f"prompts: at least one token each, with ids of 0 to {config.vocab_size - 1}, is expected")
    if width + bucket(spec.max_new_tokens) > config.max_positions:
        raise InputError(
            f"prompts of up to {width} tokens and {spec.max_new_tokens} new ones need more than the model's "
            f"{config.max_positions} positions; shorten one or the other"
        )
    contexts = min(max(1, spec.batch // spec.n), len(ids))
    shape = with_caches(at_once(contexts, spec.n, width, spec.max_new_tokens), spec)
    groups = []
    for i in ids:
        name = hashlib.sha256(np.asarray(i, "<i4").tobytes()).hexdigest()
        groups.append(Group(tuple(i), tuple(f"{name}/{j}/s{seed}" for j in range(spec.n)), spec.max_new_tokens))
    made: list[list[Rollout]] = []
    for start in range(0, len(groups), shape.contexts):
        part = groups[start : start + shape.contexts]
        for group, several in zip(part, generate(lm, part, shape, rules(spec))):
            made.append(
                [
                    Rollout(group.context, lm.tokenizer.text(list(d.tokens)), d.tokens, d.entropy, d.logprob,
                            d.sampling_logprob, d.finish)
                    for d in several
                ]
            )  # fmt: skip
    return made


def score_batch(shape: ScoreShape, parts: int) -> ScoreShape:
    """The shape over `parts` parts of a mesh: as many contexts and rows as they divide."""
    contexts, rows = (-(-size // parts) * parts for size in (shape.contexts, shape.rows))
    return dataclasses.replace(shape, contexts=contexts, rows=rows)


def score_texts(
    lm: LanguageModel, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: ScoreShape
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Teacher-forced log-probability and entropy of every token of each text after its context, [n] float32 each.

    texts: (context, tokens) pairs. Equal pairs are computed once, and a context once a batch.
    """
    parts = batch_parts(lm.mesh)
    # Each part of the mesh has contexts of its own.
    over = score_batch(shape, parts)
    contexts, rows = over.contexts // parts, over.rows // parts
    bins: list[dict[tuple[int, ...], list[tuple[int, ...]]]] = [{}]
    for context, tokens in sorted(dict.fromkeys(texts)):
        if sum(map(len, bins[-1].values())) == rows or (context not in bins[-1] and len(bins[-1]) == contexts):
            bins.append({})
        bins[-1].setdefault(context, []).append(tokens)
    bins = bins if texts else []
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(bins), parts):
        part = bins[start : start + parts]
        arrays = _score_arrays(part, parts, contexts, rows, shape)
        with using(lm.mesh):
            placed = put_batch(lm.mesh, arrays[:2], "context"), put_batch(lm.mesh, arrays[2:])
            scored = score(lm.model.graph, lm.model.params, *placed[0], *placed[1])
        logprob, entropy = fetch(scored)
        for i, several in enumerate(part):
            pairs = [(context, tokens) for context, all_of in several.items() for tokens in all_of]
            for row, (context, tokens) in enumerate(pairs, i * rows):
                found[context, tokens] = logprob[row, : len(tokens)], entropy[row, : len(tokens)]
    return [found[text] for text in texts]


def _score_arrays(
    bins: Sequence[dict[tuple[int, ...], list[tuple[int, ...]]]],
    parts: int,
    contexts: int,
    rows: int,
    shape: ScoreShape,
) -> tuple[np.ndarray, ...]:
    """What `score` is given: context, context_length, of_row, tokens; `contexts` and `rows` of each part of the
    mesh."""
    context, length = np.zeros((parts * contexts, shape.context_length), np.int32), np.ones(parts * contexts, np.int32)
    of_row, tokens = np.zeros(parts * rows, np.int32), np.zeros((parts * rows, shape.length), np.int32)
    for i, several in enumerate(bins):
        row = i * rows
        for j, (ids, texts) in enumerate(several.items()):
            context[i * contexts + j, : len(ids)], length[i * contexts + j] = ids, len(ids)
            for text in texts:
                of_row[row], tokens[row, : len(text)] = j, text
                row += 1
    return context, length, of_row, tokens


def split_steps(
    lm: LanguageModel, rollouts: Sequence[Sequence[int]], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps of rollouts on the host: index [N, width] int32, starts [N, width] bool, count [N] int32.

    In batches of one shape (256 rows), padded.
    """
    rows, parts = 256, []
    for start in range(0, len(rollouts), rows):
        part = [list(tokens) for tokens in rollouts[start : start + rows]]
        tokens, length = pad_rows(part, width, rows)
        text_length = [len(lm.tokenizer.without_eos(t)) for t in part]
        text_length += [text_length[0]] * (rows - len(part))
        steps = find_steps(lm.tokenizer.newlines, tokens, length, np.asarray(text_length, np.int32))
        parts.append([np.asarray(x)[: len(part)] for x in steps])
    if not parts:
        return np.zeros((0, width), np.int32), np.zeros((0, width), bool), np.zeros(0, np.int32)
    index, starts, count = (np.concatenate(column) for column in zip(*parts))
    return index, starts, count
