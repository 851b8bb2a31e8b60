"""Steps found on token ids against splitting the decoded text."""

import re

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from heal_jax.model.tokenizer import WHITE_SPACE, newline_table
from heal_jax.rollout.steps import find_steps

# One vocabulary that merges newlines with their neighbours, one that has them one by one, one with both and worse.
MERGING = ["<eos>", "a", "b", ".\n\n", "\n\n", " ", "\n", "x\n", "\n\ny", "p\n\nq", "\n\n\n"]
SINGLE = ["<eos>", "a", "b", "\n", " ", "\t"]
WILD = ["<eos>", "", "a\n", "\na", "\n\n", "\n", " \n\n ", "a\n\nb\n\nc\n", "\n\n\n\n", " ", "z\n\n", "\n\nz\n\n"]
WIDTH = 14


def by_text(pieces: list[str]) -> list[int]:
    """Step of each piece, from the text alone; -1 everywhere where there is no step."""
    text = "".join(pieces)
    starts = np.cumsum([0, *map(len, pieces)])
    ends = [match.end() for match in re.finditer(r"\n{2,}", text)]
    # A run's last newline ends the step of the piece that holds it.
    step, steps = 0, []
    for i in range(len(pieces)):
        steps.append(step)
        step += any(starts[i] < end <= starts[i + 1] for end in ends)
    blank = {s: not "".join(p for p, t in zip(pieces, steps) if t == s).strip(WHITE_SPACE) for s in set(steps)}
    if all(blank.values()):
        return [-1] * len(pieces)
    out, current = [], -1
    for s in sorted(set(steps)):
        current += not blank[s]
        out += [max(current, 0)] * steps.count(s)
    return out


def by_graph(vocabulary: list[str], ids: list[int], eos: bool) -> tuple[list[int], list[int], int]:
    tokens = np.full((1, WIDTH), 3, np.int32)  # what lies beyond the rollout must not matter
    tokens[0, : len(ids)] = ids
    length = len(ids) + eos
    if eos:
        tokens[0, len(ids)] = 0
    steps = find_steps(newline_table(vocabulary), jnp.asarray(tokens), jnp.array([length]), jnp.array([len(ids)]))
    index = np.asarray(steps.of_token[0]).tolist()
    return index[:length], np.flatnonzero(steps.starts[0]).tolist(), int(steps.number[0])


def agree(vocabulary: list[str], ids: list[int], eos: bool) -> None:
    index, starts, count = by_graph(vocabulary, ids, eos)
    want = by_text([vocabulary[i] for i in ids])
    if eos:
        want = [*want, want[-1] if want else -1]
    assert index == want
    assert count == len({s for s in want if s >= 0})
    assert starts == [i for i, s in enumerate(want[: len(ids)]) if s >= 0 and (i == 0 or want[i - 1] != s)]


def rollouts(vocabulary: list[str]) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, len(vocabulary) - 1), max_size=WIDTH - 1)


@given(rollouts(MERGING), st.booleans())
@example([1, 3, 6, 2], True)  # ".\n\n" + "\n": the run ends one token later
@example([7, 6, 1], False)  # "x\n" + "\n"
@example([4, 4, 1], True)  # blank at the start joins the first step
@example([1, 4, 5, 4, 2, 4], True)  # blank in between joins the one before
def test_merging_vocabulary(ids, eos):
    agree(MERGING, ids, eos)


@given(rollouts(SINGLE), st.booleans())
@example([1, 3, 3, 3, 2], True)
@example([3, 4, 3, 3], True)
def test_vocabulary_of_single_newlines(ids, eos):
    agree(SINGLE, ids, eos)


@given(rollouts(WILD), st.booleans())
@example([5, 1, 5, 2], False)  # a token without text between two newlines
def test_wild_vocabulary(ids, eos):
    agree(WILD, ids, eos)


def test_both_kinds_of_tokenizer_agree_on_the_same_text():
    text = "a\n\nb\n\n\n a"
    merged = by_graph(MERGING, [1, 4, 2, 10, 5, 1], False)
    single = by_graph(SINGLE, [1, 3, 3, 2, 3, 3, 3, 4, 1], False)
    assert "".join(MERGING[i] for i in [1, 4, 2, 10, 5, 1]) == text
    assert merged[2] == single[2] == 3
    assert merged[0] == [0, 0, 1, 1, 2, 2] and single[0] == [0, 0, 0, 1, 1, 1, 1, 2, 2]
