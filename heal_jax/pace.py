"""PACE, Progressive Answer-guided Curriculum Evolution (arXiv 2603.10359; DESIGN section 2).

Plain Python on records: a few thousand candidates, no arrays.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

SOLVED_RATE = 0.5  # pass rate from which a problem is solved; below it is hard (DESIGN section 2, "Strata")
STAGE_OF_KIND = {"base": 1, "hindsight": 2, "repair": 3}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One rollout as PACE sees it. `index` orders the rollouts of a run; score is S, None where not scored."""

    rollout_id: str
    problem_id: str
    kind: str
    index: int
    grade: str
    leaked: bool
    sequence: tuple[int, ...]  # prompt and tokens, as the student will see them; empty where it cannot
    score: float | None


@dataclasses.dataclass(frozen=True)
class Variant:
    """What an ablation takes away from the curriculum; the default is HEAL."""

    stages: tuple[int, ...] = (1, 2, 3)
    """Those that are made."""
    pure: bool = True
    """Whether PURE drops and ranks candidates; without it the first ones by index are taken."""
    hardest: float = 1.0
    """The share of the problems in stage 1 that it keeps, those with the lowest pass rate, with the rollout of the
    lowest S of each: few, hard and good examples, after LIMO (arXiv 2502.03387)."""
    hinted: bool = False
    """Whether examples are what the teacher saw: hints stay in repairs, the answer in hindsight's prompts."""


HEAL = Variant()


@dataclasses.dataclass(frozen=True)
class Decision:
    """stage 0: in no stage."""

    rollout_id: str
    stage: int
    kept: bool
    reason: str


def stratum(correct: float, n: int, max_correct: float) -> str:
    """solved, hard or unsolved (the hard end of hard: both at once, named by the narrower)."""
    if correct / n >= SOLVED_RATE:
        return "solved"
    return "unsolved" if correct <= max_correct else "hard"


def curate(
    candidates: Sequence[Candidate],
    strata: dict[str, str],
    threshold: float,
    per_problem: int,
    max_tokens: int,
    variant: Variant = HEAL,
) -> list[Decision]:
    """A decision and its reason for every candidate, in the order given.

    Stage 1: correct base rollouts. Stage 2: correct hindsight rollouts of hard problems that PURE keeps. Stage 3:
    correct repairs of unsolved problems that PURE keeps. Identical sequences count once in a stage (and once in what a
    phase trains on: `pool`), those longer than `max_tokens` not at all, and of each problem at most `per_problem` a
    stage, the lowest S first, stage 1 by index.
    """
    few = _hardest(candidates, variant.hardest)

    def refusal(c: Candidate) -> str:
        if (stage := STAGE_OF_KIND[c.kind]) not in variant.stages:
            return f"stage {stage} is left out"
        if c.kind == "base" and c.problem_id not in few:
            return "not among the hardest problems"
        return _refusal(c, strata, threshold if variant.pure else None, max_tokens)

    refused = {c.rollout_id: reason for c in candidates if (reason := refusal(c))}
    passed = [c for c in candidates if c.rollout_id not in refused]

    def order(c: Candidate) -> tuple[int, float, int]:
        stage = STAGE_OF_KIND[c.kind]
        ranked = variant.hardest < 1 if stage == 1 else variant.pure
        return stage, c.score if ranked and c.score is not None else 0.0, c.index

    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    most = 1 if variant.hardest < 1 else per_problem
    room: dict[tuple[str, int], int] = defaultdict(lambda: most)
    kept: dict[str, int] = {}
    for c in sorted(passed, key=order):
        stage = STAGE_OF_KIND[c.kind]
        if (stage, c.sequence) in seen:
            refused[c.rollout_id] = f"same tokens as {seen[stage, c.sequence]}"
            continue
        seen[stage, c.sequence] = c.rollout_id
        if room[c.problem_id, stage] == 0:
            refused[c.rollout_id] = f"over the {most} example{'s' * (most > 1)} of a problem in stage {stage}"
            continue
        room[c.problem_id, stage] -= 1
        kept[c.rollout_id] = stage
    return [
        Decision(c.rollout_id, kept[c.rollout_id], True, "kept")
        if c.rollout_id in kept
        else Decision(c.rollout_id, 0, False, refused[c.rollout_id])
        for c in candidates
    ]


def _hardest(candidates: Sequence[Candidate], share: float) -> set[str]:
    """That share of the problems with a correct unaided rollout, lowest pass rate first, ties in their order."""
    tried = Counter(c.problem_id for c in candidates if c.kind == "base")
    right = Counter(c.problem_id for c in candidates if c.kind == "base" and c.grade == "correct")
    ordered = sorted(right, key=lambda problem: right[problem] / tried[problem])
    return set(ordered[: math.ceil(share * len(ordered))])


def _refusal(c: Candidate, strata: dict[str, str], threshold: float | None, max_tokens: int) -> str:
    """Why a candidate cannot be in its stage; empty where it can."""
    if c.grade != "correct":
        return c.grade
    if c.leaked:
        return "talks about the hint"
    if not c.sequence:
        return "text that the student's tokenizer cannot write"
    if len(c.sequence) > max_tokens:
        return f"longer than {max_tokens} tokens"
    if c.kind == "base":
        return ""
    stratum = strata[c.problem_id]
    if c.kind == "hindsight" and stratum == "solved":
        return "problem is solved"
    if c.kind == "repair" and stratum != "unsolved":
        return "problem is not unsolved"
    if threshold is not None and (c.score is None or not c.score <= threshold):
        return f"PURE {'not scored' if c.score is None else format(c.score, '.3f')} > {threshold:g}"
    return ""


def pool(sequences: Sequence[tuple[int, ...]]) -> list[int]:
    """Indices of the first of each identical sequences: what a phase that draws from several stages trains on."""
    first: dict[tuple[int, ...], int] = {}
    for i, sequence in enumerate(sequences):
        first.setdefault(sequence, i)
    return list(first.values())


def phases(order: str, stages: Sequence[Sequence[object]]) -> list[list[int]]:
    """Which stages (0, 1, 2) each stretch of training draws from; empty stages have none.

    cumulative: stage k trains on stages 1..k; separate: on its own alone; shuffled: all together, once.
    """
    present = [i for i, stage in enumerate(stages) if len(stage)]
    if order == "cumulative":
        return [[j for j in present if j <= i] for i in present]
    if order == "separate":
        return [[i] for i in present]
    if order == "shuffled":
        return [present] if present else []
    raise ValueError(f"order {order!r}")
