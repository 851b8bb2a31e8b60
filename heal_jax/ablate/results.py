"""ablation.json: what the arms of all seeds come to.

`arms`, by name: what; accuracy {mean, ci95, n, per_level, per_stratum}; gain, of the student over itself before
training {mean, ci95, n, per_level, per_stratum, per_seed}; difference, the same over the baseline's student;
heal_minus, of HEAL's student over this one; examples by stage, tokens and loss_tokens trained on, teacher_tokens by
kind of rollout and in all, repairs as curate counts them, teacher_seconds (means over seeds); per_problem: teacher
tokens and seconds for each problem more that the student solves than it did before training, and beyond the
baseline's; null where it solves none more. `before`: teacher and untrained student. `teacher`: by seed, problems by
correct rollouts of n, strata. Strata of held-out problems have the bounds of training (DESIGN section 2), by the
teacher's samples of all seeds. Seconds hold compiling. Shares are of 1; accuracies are on the same held-out problems
with the same samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heal_jax.ablate.arms import BASELINE, WHOLE, Arm
from heal_jax.bootstrap import crossed
from heal_jax.config import Config
from heal_jax.pace import stratum
from heal_jax.problems.sources import Problem
from heal_jax.strict import to_dict

Record = Mapping[str, Any]
Groups = Mapping[str, np.ndarray]  # per_level, per_stratum: a name for each problem, [problems]


def ablation(
    config: Config, problems: Sequence[Problem], arms: Sequence[Arm], teachers: Sequence[Record],
    made: Mapping[str, Sequence[Record]],
) -> dict[str, Any]:  # fmt: skip
    """teachers: of each seed, as `seed.shared` has it; made: of each arm and seed, as `seed.one` has it. Of arms of
    which a seed is not there yet nothing is said.
    """
    whole = [arm for arm in arms if len(made[arm.name]) == len(teachers)]
    few = config.gear.max_correct / config.sample.n
    rates = np.array([t["means"]["teacher"] for t in teachers]).mean(axis=0)
    groups = {
        "per_level": np.array([p.level for p in problems]),
        "per_stratum": np.array([stratum(rate, 1, few) for rate in rates]),
    }
    before = {
        name: _accuracy(config, groups, [t["means"][name] for t in teachers]) for name in ("teacher", "student_base")
    }
    base = np.array([t["means"]["student_base"] for t in teachers])
    return {
        "config": to_dict(config),
        "seeds": [config.seed + i for i in range(len(teachers))],
        "teacher": [t["teacher"] for t in teachers],
        "before": before,
        "arms": {arm.name: {"what": arm.what} | _of_arm(config, groups, arm, base, teachers, made) for arm in whole},
    }


def _of_arm(
    config: Config, groups: Groups, arm: Arm, base: np.ndarray, teachers: Sequence[Record],
    made: Mapping[str, Sequence[Record]],
) -> dict[str, Any]:  # fmt: skip
    own, baseline = made[arm.name], made[BASELINE]
    means = _means(own)

    def beyond(more: np.ndarray, less: np.ndarray) -> dict[str, Any]:
        return _accuracy(config, groups, more - less) | {"per_seed": [float(x) for x in (more - less).mean(axis=1)]}

    found: dict[str, Any] = {"accuracy": _accuracy(config, groups, means), "gain": beyond(means, base)}
    tokens = [sum(record["tokens"].values()) for record in own]
    seconds = [_seconds(arm, teacher, record) for teacher, record in zip(teachers, own)]
    gained = [means.shape[1] * float(x) for x in (means - base).mean(axis=1)]
    costs = {"over_student_base": _cost(tokens, seconds, gained)}
    if arm.name != BASELINE:
        others = _means(baseline)
        found["difference"] = beyond(means, others)
        more_tokens = [x - sum(record["tokens"].values()) for x, record in zip(tokens, baseline)]
        more_seconds = [x - sum(teacher["work"][name] for name in ("sample",)) for x, teacher in zip(seconds, teachers)]
        more = [means.shape[1] * float(x) for x in (means - others).mean(axis=1)]
        costs["over_baseline"] = _cost(more_tokens, more_seconds, more)
    if arm.name != WHOLE and len(made.get(WHOLE, ())) == len(own):
        found["heal_minus"] = beyond(_means(made[WHOLE]), means)
    return found | {
        "examples": {stage: _mean(record["examples"][stage] for record in own) for stage in own[0]["examples"]},
        **{name: _mean(record["trained"][name] for record in own) for name in ("tokens", "loss_tokens")},
        "teacher_tokens": {
            kind: _mean(record["tokens"].get(kind, 0) for record in own)
            for kind in sorted({kind for record in own for kind in record["tokens"]})
        } | {"all": _mean(tokens)},
        "teacher_seconds": round(float(np.mean(seconds)), 1),
        "repairs": {name: _mean(record["repair"][name] for record in own) for name in own[0]["repair"]},
        "per_problem": costs,
    }  # fmt: skip


def _means(records: Sequence[Record]) -> np.ndarray:
    """[seeds, problems] float64"""
    return np.array([record["means"] for record in records])


def _seconds(arm: Arm, teacher: Record, record: Record) -> float:
    """Of the teacher, for all that the arm uses."""
    shared = ["sample", *(name for name in arm.aided if name not in record["work"])]
    return sum(teacher["work"].get(name, 0.0) for name in shared) + sum(record["work"].values())


def _cost(tokens: Sequence[float], seconds: Sequence[float], problems: Sequence[float]) -> dict[str, Any]:
    """Of one problem more, from the sums over seeds."""
    more = sum(problems)
    if more <= 0:
        return {"problems": _mean(problems, 2), "tokens": None, "seconds": None}
    return {
        "problems": _mean(problems, 2),
        "tokens": round(sum(tokens) / more),
        "seconds": round(sum(seconds) / more, 3),
    }


def _mean(values: Any, digits: int = 0) -> float:
    mean = round(float(np.mean(list(values))), digits)
    return mean if digits else int(mean)


def _accuracy(config: Config, groups: Groups, values: Any) -> dict[str, Any]:
    """mean, ci95, n, and the same of each part that groups make: values [seeds, problems]."""
    values = np.asarray(values)

    def figures(part: np.ndarray) -> dict[str, Any]:
        ci95 = crossed(part, config.evaluate.resamples, config.seed)
        return {"mean": float(part.mean()), "ci95": ci95, "n": part.shape[1]}

    return figures(values) | {
        by: {str(name): figures(values[:, names == name]) for name in np.unique(names)} for by, names in groups.items()
    }
