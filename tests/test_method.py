"""GEAR and PURE against slow float64 versions written from the formulas; PACE against its rules."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heal_jax import gear, pace, pure

K = 16


def ragged(draw, count):
    """Tokens of `count` steps: step of each token and a value for each."""
    lengths = [draw(st.integers(1, 4)) for _ in range(count)]
    index = [k for k, n in enumerate(lengths) for _ in range(n)]
    # On a grid, so that ties are real ties and near ties do not hinge on rounding.
    values = [draw(st.integers(0, 40)) / 8 for _ in index]
    return index, values


@st.composite
def rollouts(draw, least=1):
    return ragged(draw, draw(st.integers(least, K)))


def as_rows(index, values, width=K * 4 + 3):
    entropy, step = np.full((1, width), 9.0, np.float32), np.full((1, width), -1, np.int32)
    entropy[0, : len(values)] = values
    step[0, : len(index)] = index
    return jnp.asarray(entropy), jnp.asarray(step)


def slow_step_entropy(index, values):
    return [float(np.mean([np.float64(v) for i, v in zip(index, values) if i == k])) for k in range(max(index) + 1)]


def slow_surge(h, k, kind):
    if kind == "difference":
        return h[k] - h[k - 1]
    if kind == "ratio":
        return h[k] / (h[k - 1] + 0.01)
    return (h[k] - np.mean(h[:k])) / (np.std(h[:k]) + 0.01)


@given(rollouts(least=2), st.sampled_from([1 / 3, 0.3, 0.5, 1.0]), st.sampled_from(["difference", "ratio", "zscore"]))
def test_breakpoint(rollout, window, kind):
    index, values = rollout
    h = slow_step_entropy(index, values)
    count = len(h)
    high = max(1, math.ceil(round(count * window, 9)) - 1)
    surges = [slow_surge(h, k, kind) for k in range(1, high + 1)]

    entropy, step = as_rows(index, values)
    ours = gear.step_entropy(entropy, step, K)
    np.testing.assert_allclose(ours[0, :count], h, rtol=1e-6)
    np.testing.assert_allclose(gear.surge(ours, kind)[0, 1:count], [slow_surge(h, k, kind) for k in range(1, count)],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    k = int(
        gear.breakpoints(
            ours, jnp.array([count]), gear.last_candidate(K, window)[[count]], np.zeros((1, 2), np.uint32),
            np.zeros(1, np.int32), kind="surge", surge_kind=kind,
        )[0]
    )  # fmt: skip
    assert 1 <= k <= high
    best = max(surges)
    assert surges[k - 1] >= best - 1e-3 * max(1, abs(best))
    if kind == "difference" and len(set(np.bincount(index))) == 1:
        assert k == surges.index(best) + 1  # steps of equal length: the sums are exact, ties go to the earliest


@pytest.mark.parametrize(
    ("count", "kept_possible"), [(1, 0), (2, 0), (6, 0), (7, 1), (9, 1), (10, 2), (12, 2), (13, 3)]
)
def test_window_of_a_third_keeps_a_prefix_from_seven_steps_on(count, kept_possible):
    last = gear.last_candidate(K, 1 / 3)[count]
    assert last == max(1, -(-count // 3) - 1) and last - 1 == kept_possible


def test_one_step_has_no_breakpoint_and_keeps_nothing():
    entropy, step = as_rows([0, 0], [1.0, 2.0])
    for kind in ("surge", "random", "oracle"):
        k = gear.breakpoints(
            gear.step_entropy(entropy, step, K), jnp.array([1]), jnp.array([1]), np.zeros((1, 2), np.uint32),
            np.array([3], np.int32), kind=kind, surge_kind="difference",
        )  # fmt: skip
        assert k.tolist() == [gear.NONE]
        assert gear.kept_tokens(step == 0, k, backup=0).tolist() == [0]


def test_random_breakpoints_are_uniform_over_the_window_and_keyed():
    rows, count = 3000, 13
    keys = np.random.default_rng(0).integers(0, 2**32, (rows, 2), dtype=np.uint32)
    arguments = (jnp.zeros((rows, K)), jnp.full(rows, count), jnp.full(rows, 4), keys, np.zeros(rows, np.int32))
    k = np.asarray(gear.breakpoints(*arguments, kind="random", surge_kind="difference"))
    again = np.asarray(gear.breakpoints(*arguments, kind="random", surge_kind="difference"))
    np.testing.assert_array_equal(k, again)
    counts = np.bincount(k, minlength=5)[1:]
    expected = rows / 4
    assert set(k) == {1, 2, 3, 4}
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.1 %


def test_the_oracle_cuts_at_the_first_wrong_step():
    k = gear.breakpoints(
        jnp.zeros((4, K)), jnp.array([12, 12, 12, 2]), jnp.array([3, 3, 3, 1]), np.zeros((4, 2), np.uint32),
        np.array([7, 0, 40, 5], np.int32), kind="oracle", surge_kind="difference",
    )  # fmt: skip
    assert k.tolist() == [7, 1, 11, 1]  # anywhere in the chain, never before step 1 or beyond the last


@given(rollouts(), st.integers(0, 3), st.data())
def test_kept_tokens_are_those_of_the_first_steps(rollout, backup, data):
    index, values = rollout
    k = data.draw(st.integers(1, max(index) + 1))
    starts = np.array([[i == 0 or index[i] != index[i - 1] for i in range(len(index))]])
    kept = int(gear.kept_tokens(jnp.asarray(starts), jnp.array([k]), backup=backup)[0])
    assert kept == sum(i < max(0, k - backup) for i in index)


@st.composite
def candidates(draw):
    index, _ = ragged(draw, draw(st.integers(1, K - 1)))
    logprob = [-draw(st.integers(0, 40)) / 8 for _ in index]
    entropy = [draw(st.integers(0, 16)) / 8 for _ in index]
    cut_step = draw(st.integers(0, max(index)))
    answer = draw(st.none() | st.tuples(st.integers(0, len(index) - 1), st.integers(1, 5)))
    return index, logprob, entropy, cut_step, answer


@given(candidates(), st.sampled_from([0.0, 0.2, 1.0]))
def test_pure(candidate, weight):
    index, logprob, entropy, cut_step, answer = candidate
    kept = index.index(cut_step)
    span = None if answer is None else (answer[0], min(len(index), answer[0] + answer[1]))
    # From the formulas: groups of tokens, the answer as one more, the last.
    groups = {}
    for t, k in enumerate(index):
        if k >= cut_step:
            is_answer = span is not None and span[0] <= t < span[1]
            groups.setdefault("answer" if is_answer else k, []).append(t)
    order = sorted(k for k in groups if k != "answer") + (["answer"] if "answer" in groups else [])
    ppl = [math.exp(-sum(logprob[t] for t in groups[k]) / len(groups[k])) for k in order]
    expected = [math.exp(sum(entropy[t] for t in groups[k]) / len(groups[k])) for k in order]
    r = [p / (e + 0.01) for p, e in zip(ppl, expected)]
    score = (1 - weight) * sum(r) / len(r) + weight * max(r)

    width = K * 4 + 3
    padded = [np.zeros((1, width), np.float32) for _ in range(2)]
    for array, values in zip(padded, (logprob, entropy)):
        array[0, : len(values)] = values
    steps = np.full(width, -1, np.int32)
    steps[: len(index) + 1] = [*index, index[-1]]  # the EOS belongs to the last step
    ours = pure.purity(*padded, scored_steps(steps, span, kept, len(index))[None], 0.01, weight, steps=K + 1)
    n = int(ours.steps[0])
    assert n == len(order)
    np.testing.assert_allclose(ours.ppl[0, :n], ppl, rtol=1e-5)
    np.testing.assert_allclose(ours.expected_ppl[0, :n], expected, rtol=1e-5)
    np.testing.assert_allclose(ours.score[0], score, rtol=1e-5)


def test_nothing_scored_is_never_kept():
    nothing = pure.purity(jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.full((1, 4), -1), 0.01, 0.2, steps=3)
    assert np.isinf(nothing.score[0])


def test_text_that_the_teacher_would_write_scores_one():
    # Where the tokens are as likely as expected, the ratio is 1 less epsilon, however uncertain the teacher is.
    entropy = jnp.array([[0.0, 0.5, 2.0, 2.0]])
    s = pure.purity(-entropy, entropy, jnp.array([[0, 0, 1, 1]]), 1e-6, 0.2, steps=4).score
    np.testing.assert_allclose(s, 1.0, atol=1e-4)


def candidate(rollout_id, kind, problem="p", grade="correct", score=1.0, leaked=False, index=0, sequence=None):
    return pace.Candidate(rollout_id, problem, kind, index, grade, leaked, sequence or (hash(rollout_id),), score)


def test_strata():
    assert [pace.stratum(c, 30, 1) for c in (0, 1, 2, 14, 15, 30)] == [
        "unsolved", "unsolved", "hard", "hard", "solved", "solved"
    ]  # fmt: skip


def test_curate_follows_the_rules():
    strata = {"p": "unsolved", "h": "hard", "s": "solved"}
    given_candidates = [
        candidate("b0", "base", index=0),
        candidate("b1", "base", index=1, grade="truncated"),
        candidate("b2", "base", index=2, sequence=(hash("b0"),)),
        candidate("h0", "hindsight", "h", score=1.3, index=3),
        candidate("h1", "hindsight", "s", index=4),
        candidate("h2", "hindsight", "h", index=5, leaked=True),
        candidate("h3", "hindsight", "h", index=6),
        candidate("r0", "repair", score=1.1, index=7),
        candidate("r1", "repair", score=1.05, index=8),
        candidate("r2", "repair", score=1.0, index=9),
        candidate("r3", "repair", "h", index=10),
        candidate("r4", "repair", score=math.nan, index=11),
        candidate("r5", "repair", score=1.0, index=12, sequence=(hash("b0"),)),
        candidate("r6", "repair", score=None, index=13),
        candidate("r7", "repair", index=14, sequence=(1,) * 6),
    ]
    decisions = {d.rollout_id: d for d in pace.curate(given_candidates, strata, 1.12, per_problem=2, max_tokens=5)}
    assert [d for d in decisions] == [c.rollout_id for c in given_candidates]
    assert {i: d.stage for i, d in decisions.items() if d.kept} == {"b0": 1, "h3": 2, "r2": 3, "r5": 3}
    reasons = {i: d.reason for i, d in decisions.items() if not d.kept}
    assert reasons == {
        "b1": "truncated",
        "b2": "same tokens as b0",
        "h0": "PURE 1.300 > 1.12",
        "h1": "problem is solved",
        "h2": "talks about the hint",
        "r0": "over the 2 examples of a problem in stage 3",
        "r1": "over the 2 examples of a problem in stage 3",
        "r3": "problem is not unsolved",
        "r4": "PURE nan > 1.12",
        "r6": "PURE not scored > 1.12",
        "r7": "longer than 5 tokens",
    }


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["base", "hindsight", "repair"]), st.sampled_from("psh"),
            st.sampled_from(["correct", "wrong"]), st.integers(0, 5), st.floats(0.9, 1.3),
        ),
        max_size=30,
    ),
    st.integers(1, 3),
)  # fmt: skip
def test_curate_properties(drawn, per_problem):
    strata = {"p": "unsolved", "h": "hard", "s": "solved"}
    items = [
        pace.Candidate(f"r{i}", problem, kind, i, grade, False, (ord(problem), sequence), score)
        for i, (kind, problem, grade, sequence, score) in enumerate(drawn)
    ]
    decisions = pace.curate(items, strata, 1.12, per_problem, 2)
    kept = [(c, d) for c, d in zip(items, decisions) if d.kept]
    assert len(decisions) == len(items)
    assert all(d.stage == pace.STAGE_OF_KIND[c.kind] and c.grade == "correct" for c, d in kept)
    assert len({(d.stage, c.sequence) for c, d in kept}) == len(kept)
    for stage in (1, 2, 3):
        for problem in "psh":
            assert sum(d.stage == stage and c.problem_id == problem for c, d in kept) <= per_problem
    assert all(d.stage == 0 and d.reason for d in decisions if not d.kept)


def test_variants_of_the_curriculum():
    strata = {"p": "unsolved", "h": "hard", "s": "solved", "t": "solved"}
    items = [
        *(candidate(f"s{i}", "base", "s", index=i, score=1.2 - i / 10) for i in range(2)),
        candidate("s2", "base", "s", index=2, grade="wrong"),
        *(candidate(f"t{i}", "base", "t", index=3 + i) for i in range(2)),
        candidate("h0", "hindsight", "h", index=5, score=3.0),
        candidate("h1", "hindsight", "h", index=6, score=1.0),
        candidate("r0", "repair", "p", index=7, score=None),
        candidate("r1", "repair", "p", index=8, score=1.0),
        candidate("r2", "repair", "p", index=9, leaked=True),
    ]

    def kept(**variant):
        decisions = pace.curate(items, strata, 1.12, 1, 5, pace.Variant(**variant))
        assert all(d.kept or d.reason for d in decisions)
        return {d.rollout_id: d.stage for d in decisions if d.kept}

    assert kept() == {"s0": 1, "t0": 1, "h1": 2, "r1": 3}
    assert kept(stages=(1, 3)) == {"s0": 1, "t0": 1, "r1": 3}
    assert kept(stages=(1,)) == {"s0": 1, "t0": 1}
    assert kept(pure=False) == {"s0": 1, "t0": 1, "h0": 2, "r0": 3}  # by index, whatever the score
    assert kept(stages=(1,), hardest=0.5) == {"s1": 1}  # two thirds right against all, and of these the lowest S
    assert kept(stages=(1,), hardest=0.51) == {"s1": 1, "t0": 1}


def test_pool_keeps_the_first_of_equals():
    assert pace.pool([(1,), (2,), (1,), (3,), (2,)]) == [0, 1, 3]


def scored_steps(steps, answer, kept, length):
    """Of one rollout."""
    rows = ([x] for x in (steps, answer or (0, 0), kept, length))
    return np.asarray(pure.scored_steps(*(np.asarray(x, np.int32) for x in rows)))[0]


def test_an_answer_after_the_thinking_part_is_scored():
    steps = np.array([0, 0, 1, 1, -1, -1, -1, -1], np.int32)  # two steps of thinking, then "answer: 42 <eos>"
    assert scored_steps(steps, (5, 7), 0, 7).tolist() == [0, 0, 1, 1, -1, 2, 2, -1]


def test_what_still_belongs_to_the_kept_step_is_not_scored():
    # kept "a\n\n", continuation "\nb...": the newline belongs to the kept step
    assert scored_steps([0, 0, 0, 1, 1], None, 2, 5).tolist() == [-1, -1, -1, 0, 0]


def test_phases():
    assert pace.phases("cumulative", ["a", "b", "c"]) == [[0], [0, 1], [0, 1, 2]]
    assert pace.phases("cumulative", ["a", "", "c"]) == [[0], [0, 2]]
    assert pace.phases("separate", ["a", "", "c"]) == [[0], [2]]
    assert pace.phases("shuffled", ["a", "", "c"]) == [[0, 2]]
    assert pace.phases("shuffled", ["", "", ""]) == []
