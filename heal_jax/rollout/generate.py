"""From contexts to rollouts: padding, buckets, fixed batches, device and back."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from heal_jax.config import SampleSpec, check
from heal_jax.errors import InputError
from heal_jax.model.lm import LanguageModel, Rollout
from heal_jax.model.mesh import batch_parts, put_batch, using, whole_rows
from heal_jax.processes import fetch
from heal_jax.rollout.decode import key_words, roll_out, score
from heal_jax.rollout.sampling import Rule, rules
from heal_jax.rollout.steps import find_steps
from heal_jax.shapes import Shape, bucket


@dataclasses.dataclass(frozen=True)
class Group:
    """Rollouts that share a context: ids seed their randomness; budget bounds the new tokens of each."""

    context: tuple[int, ...]
    hint: tuple[int, ...]
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


def key_of(name: str) -> np.ndarray:
    """The PRNG key of whatever has this name: [2] uint32."""
    return key_words(hashlib.sha256(name.encode()).digest())


def pad_rows(rows: Sequence[Sequence[int]], width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [count, width] int32 and lengths [count] int32; rows beyond the given ones repeat the first."""
    tokens, length = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
    for i in range(count):
        row = rows[i] if i < len(rows) else rows[0]
        tokens[i, : len(row)] = row
        length[i] = len(row)
    return tokens, length


def batch_arrays(groups: Sequence[Group], shape: Shape) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """What `roll_out` is given, by context (context, context_length, hint, hint_length) and by row (keys, budget)."""
    context, context_length = pad_rows([g.context for g in groups], shape.context_length, shape.contexts)
    hint, hint_length = pad_rows([g.hint for g in groups], shape.hint_length, shape.contexts)
    rows = shape.contexts * shape.repeats
    keys, budget = np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32)
    for i, group in enumerate(groups):
        for j, rollout_id in enumerate(group.rollout_ids):
            keys[i * shape.repeats + j] = key_of(rollout_id)
            budget[i * shape.repeats + j] = min(group.budget, shape.max_new)
    return (context, context_length, hint, hint_length), (keys, budget)


def generate(lm: LanguageModel, groups: Sequence[Group], shape: Shape, rules: tuple[Rule, ...]) -> list[list[Decoded]]:
    """Decode one batch: at most shape.contexts groups of shape.repeats rollouts -> the rollouts of each group."""
    contexts, rows = batch_arrays(groups, shape)
    with using(lm.mesh):
        out = roll_out(
            lm.model.graph,
            lm.model.params,
            *put_batch(lm.mesh, contexts, "context"),
            *put_batch(lm.mesh, rows),
            lm.eos_ids,
            rules=rules,
            repeats=shape.repeats,
            max_new=bucket(shape.max_new),
            slots=shape.slots,
        )
    tokens, entropy, logprob, sampling, length, stopped = fetch(out)

    def decoded(row: int, rollout_id: str) -> Decoded:
        n = int(length[row])
        finish = "stop" if stopped[row] else "length"
        return Decoded(rollout_id, tokens[row, :n], entropy[row, :n], logprob[row, :n], sampling[row, :n], finish)

    return [
        [decoded(i * shape.repeats + j, rollout_id) for j, rollout_id in enumerate(group.rollout_ids)]
        for i, group in enumerate(groups)
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
    parts = batch_parts(lm.mesh)
    unit = parts // math.gcd(parts, spec.n)  # contexts whose rollouts the mesh divides
    contexts = -(-min(spec.batch // spec.n, len(ids)) // unit) * unit
    shape = Shape(contexts, spec.n, width, 0, spec.max_new_tokens)
    groups = []
    for i in ids:
        name = hashlib.sha256(np.asarray(i, "<i4").tobytes()).hexdigest()
        groups.append(Group(tuple(i), (), tuple(f"{name}/{j}/s{seed}" for j in range(spec.n)), spec.max_new_tokens))
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


def score_sequences(
    lm: LanguageModel, sequences: Sequence[tuple[int, ...]], width: int, rows: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Teacher-forced log-probability and entropy of every token of each sequence, [n] float32 each.

    Identical sequences are computed once, in batches of [rows, width] (more rows where the mesh does not divide them).
    """
    rows = whole_rows(lm.mesh, rows)
    distinct = list(dict.fromkeys(sequences))
    found: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(distinct), rows):
        part = distinct[start : start + rows]
        tokens, _ = pad_rows(part, width, rows)
        with using(lm.mesh):
            scored = score(lm.model.graph, lm.model.params, put_batch(lm.mesh, tokens))
        logprob, entropy = fetch(scored)
        found |= {seq: (logprob[i, : len(seq)], entropy[i, : len(seq)]) for i, seq in enumerate(part)}
    return [found[sequence] for sequence in sequences]


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
