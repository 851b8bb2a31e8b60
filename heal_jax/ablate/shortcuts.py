"""Does PURE separate? Shortcuts planted into right rollouts, and the flawed repairs that come by themselves.

A right unaided rollout (flawless, where a checker can tell) is spoilt in five ways, the answer staying true, and the
teacher reads all of them without a hint. A reading is a number that should be larger for what is spoilt; its ROC-AUC is
how often it is, of a spoilt and a right one. `default` is the PURE score S (DESIGN section 2).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from heal_jax.collect import longest_prompt, tokens_of, wrong_step
from heal_jax.pure import purity, scored_steps
from heal_jax.rollout.generate import score_texts
from heal_jax.rollout.thinking import thinking_steps
from heal_jax.run import Run
from heal_jax.shapes import ScoreShape, bucket, score_shape
from heal_jax.world.worlds import world_of

WEIGHTS = (0.0, 0.5, 1.0)  # lambda, besides the config's own
KINDS = ("removed", "corrupted", "swapped", "replaced", "foreign")


@dataclasses.dataclass(frozen=True)
class Text:
    """A solution as the teacher reads it. ppl, expected [K] float64, the answer last; likely: mean log-probability of a
    token; length in tokens; certainty [K - 1]: U_k of the true answer after each step but the answer, where asked for.
    """

    ppl: np.ndarray
    expected: np.ndarray
    likely: float
    length: int
    certainty: np.ndarray | None = None


Reading = Callable[[Text], float]


def readings(epsilon: float, weight: float) -> dict[str, Reading]:
    """By name. epsilon, weight: as the config has them."""

    def mixed(values: np.ndarray, weight: float = weight) -> float:
        return float((1 - weight) * values.mean() + weight * values.max()) if len(values) else 1.0

    def ratio(text: Text) -> np.ndarray:
        return text.ppl / (text.expected + epsilon)

    def after(text: Text) -> float:
        return float("nan") if text.certainty is None or not len(text.certainty) else float(text.certainty[-1])

    def over(text: Text, before: bool, add: float) -> float:
        """PPL_k against U_k: after the step, or before it."""
        if text.certainty is None or len(text.certainty) < 2:
            return float("nan")
        reasoning = text.ppl[:-1][: len(text.certainty)]  # what follows says the answer
        if len(reasoning) < len(text.certainty):  # paragraphs after a thinking part are no steps of their own
            return float("nan")
        ppl = reasoning[1:] if before else reasoning
        known = text.certainty[:-1] if before else text.certainty
        return mixed(ppl / (known + add))

    def weighted(other: float, text: Text) -> float:
        return mixed(ratio(text), other)

    found: dict[str, Reading] = {"default": lambda t: mixed(ratio(t))}
    found |= {f"lambda {other:g}": functools.partial(weighted, other) for other in WEIGHTS}
    return found | {
        "without the answer": lambda t: mixed(ratio(t)[:-1]),
        "perplexity": lambda t: mixed(t.ppl),
        "perplexity without the answer": lambda t: mixed(t.ppl[:-1]),
        "U after the last step": after,
        "PPL / (U after + 0.01)": lambda t: over(t, False, 0.01),
        "PPL / (U after + 1)": lambda t: over(t, False, 1.0),
        "PPL / (U before + 1)": lambda t: over(t, True, 1.0),
        "log-likelihood": lambda t: -t.likely,
        "length": lambda t: -float(t.length),
    }


def spoilt(
    steps: Sequence[str], others: Sequence[str], corrupt: Callable[[str], str], rng: np.random.Generator
) -> dict[str, list[str]]:
    """By kind, the steps of a solution (the answer last) with a shortcut; kinds that it is too short for are left out.

    others: another solution's steps.
    """
    body, answer = list(steps[:-1]), steps[-1]
    found = {}
    if len(body) >= 3:
        k = int(rng.integers(1, len(body) - 1))
        found["removed"] = [*body[:k], *body[k + 1 :], answer]
        found["corrupted"] = [*body[:k], corrupt(body[k]), *body[k + 1 :], answer]
        if body[k] != body[k - 1]:
            found["swapped"] = [*body[: k - 1], body[k], body[k - 1], *body[k + 1 :], answer]
    if body:
        found["replaced"] = [answer]
        found["foreign"] = [*others[:-1], answer]
    return found


def another_digit(step: str, rng: np.random.Generator) -> str:
    """The step with another last digit, where it has one."""
    found = list(re.finditer(r"[0-9]", step))
    if not found:
        return step + " not"
    at = found[-1].start()
    return step[:at] + str((int(step[at]) + int(rng.integers(1, 10))) % 10) + step[at + 1 :]


def texts(run: Run, solutions: Sequence[tuple[str, Sequence[str]]], certain: int) -> list[Text]:
    """Read solutions: problem id and steps of each. Of the first `certain` also the certainty of the answer."""
    lm, spec, tokenizer = run.teacher, run.config.pure, run.teacher.tokenizer
    tokens = [tuple(tokenizer.encode("\n\n".join(steps))) for _, steps in solutions]
    pairs = [(run.prompts[problem], ids) for (problem, _), ids in zip(solutions, tokens)]
    width = bucket(max(map(len, tokens)))
    shape = score_shape(run.config, longest_prompt(run))
    read = score_texts(lm, pairs, dataclasses.replace(shape, length=max(shape.length, width)))
    index, _, _ = thinking_steps(lm, tokens, width, run.config.grade)
    rows = len(tokens)
    logprob, entropy = np.zeros((2, rows, width), np.float32)
    answer, length = np.zeros((rows, 2), np.int32), np.array([len(ids) for ids in tokens], np.int32)
    for i, (ids, (log_p, h)) in enumerate(zip(tokens, read)):
        logprob[i, : len(ids)], entropy[i, : len(ids)] = log_p, h
        answer[i] = tokens_of(run, ids) or (0, 0)
    steps = np.asarray(scored_steps(index, answer, np.zeros(rows, np.int32), length))
    most = bucket(int(steps.max()) + 1)
    ppl, expected, count, _ = (
        np.asarray(x) for x in purity(logprob, entropy, steps, spec.epsilon, spec.max_weight, steps=most)
    )
    known = _certainties(run, solutions[:certain])
    return [
        Text(
            ppl[i, : count[i]].astype(float),
            expected[i, : count[i]].astype(float),
            float(logprob[i, : length[i]].mean()),
            int(length[i]),
            known[i] if i < len(known) else None,
        )
        for i in range(rows)
    ]


def _certainties(run: Run, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[np.ndarray]:
    """U_k after each step but the answer: mean negative log-likelihood of the true answer after the probe, in nats."""
    tokenizer, probe = run.teacher.tokenizer, "\n\n" + run.config.grade.answer_open
    pairs, owners = [], []
    for i, (problem, steps) in enumerate(solutions):
        said = tuple(tokenizer.encode(run.by_id[problem].answer))
        for k in range(1, len(steps)):
            before = tokenizer.encode("\n\n".join(steps[:k]) + probe)
            pairs.append((run.prompts[problem] + tuple(before), said))
            owners.append(i)
    if not pairs:
        return [np.zeros(0) for _ in solutions]
    rows = min(24, run.config.pure.batch)
    shape = ScoreShape(
        rows, rows, bucket(max(len(context) for context, _ in pairs)), bucket(max(len(said) for _, said in pairs))
    )
    values = np.array([-float(np.mean(log_p)) for log_p, _ in score_texts(run.teacher, pairs, shape)])
    return [values[np.array(owners) == i] for i in range(len(solutions))]


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """How often a value of `wrong` is larger than one of `right`; ties count half."""
    everything = np.concatenate([right, wrong])
    values, place, count = np.unique(everything, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    ranks = rank[place][len(right) :]
    return float((ranks.sum() - len(wrong) * (len(wrong) + 1) / 2) / (len(right) * len(wrong)))


def _auc(right: np.ndarray, wrong: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    """Rows are of the same problems in both: those are resampled. What could not be read is left out."""
    both = np.isfinite(right) & np.isfinite(wrong)
    right, wrong = right[both], wrong[both]
    if len(right) < 5:
        return {"mean": None, "ci95": [None, None], "n": len(right)}
    rng = np.random.default_rng([seed, len(right)])
    drawn = rng.integers(0, len(right), size=(resamples, len(right)))
    low, high = np.quantile([auc(right[d], wrong[d]) for d in drawn], [0.025, 0.975])
    return {"mean": auc(right, wrong), "ci95": [float(low), float(high)], "n": len(right)}


def planted(run: Run, most: int, certain: int, resamples: int = 500) -> dict[str, Any]:
    """ROC-AUC of each reading for each kind of planted shortcut: at most `most` rollouts, one of a problem."""
    rng = np.random.default_rng([run.config.seed, 7])
    right: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for row in run.directory.rollouts("base").select(["problem_id", "grade", "text"]).to_pylist():
        problem = run.by_id[row["problem_id"]]
        if row["grade"] != "correct" or problem.id in seen:
            continue
        if world_of(problem.source) is not None and wrong_step(problem, row["text"]) is not None:
            continue
        seen.add(problem.id)
        right.append((problem.id, [step for step in row["text"].split("\n\n") if step.strip()]))
    right = right[:most]
    if not right:
        return {"rollouts": 0}
    world = world_of(run.config.problems.source)

    def corrupt(step: str) -> str:
        return another_digit(step, rng) if world is None else world.corrupt(step, rng)

    spoilt_by_kind: dict[str, list[tuple[int, list[str]]]] = {kind: [] for kind in KINDS}
    for i, (_, steps) in enumerate(right):
        for kind, made in spoilt(steps, right[(i + 1) % len(right)][1], corrupt, rng).items():
            spoilt_by_kind[kind].append((i, made))
    found: dict[str, Any] = {"rollouts": len(right), "auc": {}}
    named = readings(run.config.pure.epsilon, run.config.pure.max_weight)
    of_right = texts(run, right, certain)
    for kind, several in spoilt_by_kind.items():
        if not several:
            continue
        run.progress.doing(f"reading {len(several)} solutions with a step {kind}")
        read = texts(run, [(right[i][0], made) for i, made in several], certain)
        for name, reading in named.items():
            before = np.array([reading(of_right[i]) for i, _ in several])
            after = np.array([reading(text) for text in read])
            found["auc"].setdefault(name, {})[kind] = _auc(before, after, run.config.seed, resamples)
    limit = run.config.pure.threshold
    default = named["default"]
    found["kept_right"] = float(np.mean([default(t) <= limit for t in of_right]))
    return found


def natural(run: Run) -> dict[str, Any]:
    """Right answers with the answer in view, flawless or not by the world's checker: how many each threshold keeps, and
    the ROC-AUC of what the records alone give. `calibrated`: the 95 % quantile of S over right unaided rollouts.
    """
    if world_of(run.config.problems.source) is None:
        return {}
    spec, columns = run.config.pure, ["problem_id", "kind", "grade", "text", "pure_score", "step_ppl"]
    rows = run.directory.rollouts().select([*columns, "step_expected_ppl"]).to_pylist()
    leaks = [re.compile(pattern) for pattern in run.config.gear.leak_patterns]  # those never come to PURE
    rows = [
        row
        for row in rows
        if row["grade"] == "correct" and row["pure_score"] is not None and not any(p.search(row["text"]) for p in leaks)
    ]
    unaided = [row["pure_score"] for row in rows if row["kind"] == "base"]
    limits = {"fixed": spec.threshold, "calibrated": float(np.quantile(unaided, 0.95)) if unaided else spec.threshold}
    found: dict[str, Any] = {"thresholds": limits}
    named = readings(spec.epsilon, spec.max_weight)
    for kind in ("hindsight", "repair"):
        seen = {(row["problem_id"], row["text"]): row for row in rows if row["kind"] == kind}
        flaws = [wrong_step(run.by_id[row["problem_id"]], row["text"]) is not None for row in seen.values()]
        read = [Text(np.array(r["step_ppl"]), np.array(r["step_expected_ppl"]), 0.0, 0) for r in seen.values()]
        flawed, score = np.array(flaws, bool), np.array([row["pure_score"] for row in seen.values()])
        found[kind] = {"flawless": int((~flawed).sum()), "flawed": int(flawed.sum())}
        if flawed.all() or not flawed.any():
            continue
        found[kind]["kept"] = {
            name: {
                "flawless": float(np.mean(score[~flawed] <= limit)),
                "flawed": float(np.mean(score[flawed] <= limit)),
            }
            for name, limit in limits.items()
        }
        of_records = ("default", *(f"lambda {w:g}" for w in WEIGHTS), "without the answer", "perplexity")
        values: Mapping[str, np.ndarray] = {name: np.array([named[name](t) for t in read]) for name in of_records}
        found[kind]["auc"] = {name: auc(v[~flawed], v[flawed]) for name, v in values.items()}
    return found
