"""The numbers that the page's figures draw and its tables repeat."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heal_jax.bootstrap import interval
from heal_jax.pace import stratum
from heal_jax.report.data import KINDS, RunData

STRATA = ("solved", "hard", "unsolved")
LEAKED = "talks about the hint"  # a decision's reason


def by_teacher(run: RunData) -> dict[str, dict[str, dict[str, Any]]]:
    """{stratum: {model: {mean, ci95, n}}} on the evaluation problems of each stratum, `difference` (HEAL minus
    rejection sampling) among the models.

    The strata have the bounds of training (DESIGN section 2), by the share of the teacher's evaluation samples that are
    right.
    A model that has not answered all problems yet is left out.
    """
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    columns = (run.evaluation[name].to_pylist() for name in ("model", "problem_id", "grade"))
    for model, problem, grade in zip(*columns, strict=True):
        found[model][problem].append(grade == "correct")
    rates = {model: {problem: float(np.mean(right)) for problem, right in of.items()} for model, of in found.items()}
    teacher = rates.get("teacher", {})
    problems = sorted(teacher)
    values = {model: np.array([of[p] for p in problems]) for model, of in rates.items() if set(of) == set(teacher)}
    if {"heal", "rejection_sampling"} <= set(values):
        values["difference"] = values["heal"] - values["rejection_sampling"]
    few = run.settings.gear.max_correct / run.settings.sample.n
    where = np.array([stratum(teacher[p], 1, few) for p in problems])
    settings = run.settings

    def figures(part: np.ndarray) -> dict[str, Any]:
        ci95 = interval(part, settings.evaluate.resamples, settings.seed)
        return {"mean": float(part.mean()), "ci95": ci95, "n": len(part)}

    return {
        name: {model: figures(part[where == name]) for model, part in values.items()}
        for name in STRATA
        if (where == name).any()
    }


def problem_flow(run: RunData) -> dict[tuple[str, str], int]:
    """{(from, to): problems}. Unsolved problems try repairs first, then hindsight as the other hard ones do: what is
    tried, is right somewhere (without talk of the hint), is somewhere kept by PURE, and is in a stage; before `curate`
    what PURE keeps ends as open."""
    tried: set[tuple[str, str]] = set()
    right: set[tuple[str, str]] = set()
    pure: set[tuple[str, str]] = set()
    stages: set[tuple[str, int]] = set()
    scored = run.rollouts["pure_score"].to_pylist()
    for (problem, kind, grade, decision), score in zip(run.outcomes(), scored, strict=True):
        tried.add((problem, kind))
        if grade == "correct" and decision.get("reason") != LEAKED:
            right.add((problem, kind))
            if score is not None and score <= run.settings.pure.threshold:
                pure.add((problem, kind))
        if decision.get("kept"):
            stages.add((problem, decision["stage"]))
    links: Counter[tuple[str, str]] = Counter()
    for name, row in run.problems.items():
        if row["stratum"] not in STRATA:
            continue
        path = ["problems", row["stratum"]]
        for kind, stage in (("repair", 3), ("hindsight", 2), ("base", 1)):
            if kind != "base":
                path += [kind] if (name, kind) in tried else []
                path += [f"{kind}-right"] if (name, kind) in right else []
                path += [f"{kind}-pure"] if (name, kind) in pure else []
            if (name, stage) in stages:
                path.append(f"stage {stage}")
                break
            if not run.decisions and (name, kind) in pure and kind != "base":
                path.append("open")
                break
        else:
            path.append("nothing" if run.decisions else "open")
        links.update(itertools.pairwise(path))
    return dict(links)


@dataclasses.dataclass(frozen=True)
class Scores:
    """PURE scores S of the scored rollouts of a kind, float64, right or not, without those that talk about the hint."""

    right: np.ndarray
    other: np.ndarray


def scores(run: RunData) -> dict[str, Scores]:
    """By kind; kinds of which nothing is scored are left out."""
    found: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for (_, kind, grade, decision), score in zip(run.outcomes(), run.rollouts["pure_score"].to_pylist(), strict=True):
        if score is not None and not math.isnan(score) and decision.get("reason") != LEAKED:
            found[kind, grade == "correct"].append(score)
    several = {kind: Scores(np.array(found[kind, True]), np.array(found[kind, False])) for kind in KINDS}
    return {kind: one for kind, one in several.items() if len(one.right) + len(one.other)}


def score_bins(several: Mapping[str, Scores], threshold: float, most: int = 80) -> np.ndarray:
    """Edges [bins + 1] float64 of equal bins, the threshold among them, that hold all but the largest scores."""
    values = np.concatenate([part for one in several.values() for part in (one.right, one.other)])
    right = np.concatenate([one.right for one in several.values()])
    finite = values[np.isfinite(values)]
    low = min(threshold, finite.min(initial=threshold))
    # A few repairs that jump to the answer are ten times as far out as all others; what is to be seen is near the
    # threshold.
    typical, side = right[np.isfinite(right)], threshold - low
    high = max(float(np.quantile(typical, 0.98)) if len(typical) else threshold, threshold + side)
    high = min(high, threshold + 8 * side) if side > 0 else high
    rough = max((high - low) / most, 1e-6)
    width = next(w for e in itertools.count(math.floor(math.log10(rough))) for m in (1, 2, 5)
                 if (w := m * 10.0**e) >= rough)  # fmt: skip
    below, above = math.ceil((threshold - low) / width - 1e-9), math.ceil((high - threshold) / width - 1e-9)
    return threshold + width * np.arange(-below, above + 1)


def binned(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts [bins + 1] of (low, high] bins as PURE's S <= threshold is one, the last of all that lies beyond them."""
    at = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 1)
    return np.bincount(at, minlength=len(edges))


def nearest(run: RunData, count: int = 4) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the right hindsight rollouts and repairs just below the threshold and just above it, the nearest first,
    no two of one problem; without those that talk about the hint."""
    rows = run.rollouts
    candidates = pc.and_(pc.is_in(rows["kind"], pa.array(KINDS[1:])), pc.equal(rows["grade"], "correct"))
    columns = ["rollout_id", "problem_id", "kind", "pure_score", "step_ppl", "step_expected_ppl"]
    found = rows.filter(pc.and_(candidates, pc.is_valid(rows["pure_score"]))).select(columns)
    limit = run.settings.pure.threshold
    distance = np.abs(found["pure_score"].to_numpy() - limit) if found.num_rows else np.zeros(0)
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    seen: tuple[set[str], set[str]] = (set(), set())
    for i in np.argsort(distance, kind="stable").tolist():
        if len(sides[0]) == len(sides[1]) == count:
            break
        side = int(not found["pure_score"][i].as_py() <= limit)
        problem, name = found["problem_id"][i].as_py(), found["rollout_id"][i].as_py()
        if len(sides[side]) == count or problem in seen[side]:
            continue
        if run.decisions.get(name, {}).get("reason") == LEAKED:
            continue
        seen[side].add(problem)
        sides[side].extend(found.slice(i, 1).to_pylist())
    return sides


def ratios(row: Mapping[str, Any], epsilon: float) -> list[float]:
    """PURE ratio of each scored step of a rollout, the answer last (DESIGN section 2)."""
    pairs = zip(row["step_ppl"] or (), row["step_expected_ppl"] or ())
    return [ppl / (expected + epsilon) for ppl, expected in pairs]


def curve(run: RunData, model: str, name: str, most: int = 400) -> list[tuple[int, float]]:
    """(step, value) of a figure of metrics.jsonl for one student; means of neighbours where there are more than
    `most`."""
    points = [(event["step"], event[name]) for event in run.training
              if event["model"] == model and event.get(name) is not None]  # fmt: skip
    each = -(-len(points) // most) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def dev(run: RunData, model: str) -> list[tuple[int, float]]:
    """(step, share of right samples) of a student's answers to the dev problems."""
    return [(event["step"], event["accuracy"]) for event in run.dev if event["model"] == model]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a student's training on the same examples: its steps (first to last), what it took, and its loss and
    dev accuracy at its end (None where not known)."""

    name: str
    first: int
    last: int
    tokens: float | None
    loss_tokens: float | None
    seconds: float | None
    loss: float | None
    dev: float | None


def phases(run: RunData, model: str) -> list[Phase]:
    """The phases of a student's training so far, from the running totals of metrics.jsonl."""
    events = [event for event in run.training if event["model"] == model]
    accuracies = dict(dev(run, model))
    found: list[Phase] = []
    before: Mapping[str, Any] = {"step": 0, "tokens": 0, "loss_tokens": 0, "seconds": 0.0}
    for name, group in itertools.groupby(events, key=lambda event: event.get("phase", "")):
        last: Mapping[str, Any] = list(group)[-1]
        took = {key: _difference(last, before, key) for key in ("tokens", "loss_tokens", "seconds")}
        found.append(Phase(name, before["step"] + 1, last["step"], **took, loss=last.get("loss"),
                           dev=accuracies.get(last["step"])))  # fmt: skip
        before = last
    return found


def _difference(after: Mapping[str, Any], before: Mapping[str, Any], key: str) -> float | None:
    return None if after.get(key) is None or before.get(key) is None else after[key] - before[key]


def work(run: RunData, stages: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Seconds and tokens of each of the run's stages so far; both students' trainings are one stage."""
    found: dict[str, tuple[float, int]] = {}
    for name, account in run.work.items():
        stage = name.split()[0] if name.split() else name
        seconds, tokens = found.get(stage, (0.0, 0))
        found[stage] = seconds + account["seconds"], tokens + account["tokens"]
    return {name: found[name] for name in (*stages, *found) if name in found}
