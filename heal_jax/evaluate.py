"""Accuracy of teacher and students on held-out problems, with bootstrap intervals."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from heal_jax import processes
from heal_jax.ask import ask, prepare
from heal_jax.bootstrap import interval
from heal_jax.config import Config
from heal_jax.curriculum import train_one, training_plan
from heal_jax.model.lm import LanguageModel
from heal_jax.model.lora import merged
from heal_jax.problems.sources import Problem
from heal_jax.run import Run
from heal_jax.sets import Draw, draws
from heal_jax.store import EVALUATION

MODELS = ("teacher", "student_base", "rejection_sampling", "heal")


def evaluate(run: Run, models: Sequence[str] = MODELS) -> None:
    """Samples of the problems of every evaluation set by each of the four models, in evaluation/."""
    for model in models:
        evaluate_one(run, model)
        run.release_teacher()
    run.directory.finish("evaluate", samples=run.config.evaluate.samples)


def trained(run: Run, name: str) -> LanguageModel:
    """A student after training, from its checkpoint; with LoRA its adapters are beside its weights."""
    phases, length = training_plan(run)
    return run.student.with_params(train_one(run, name, phases[name], length).model)


def evaluate_one(run: Run, name: str) -> None:
    """All that one model is asked for."""
    model = functools.cache(lambda: _model(run, name))  # opened by the first shard that is missing
    for draw in draws(run.config):
        _shards(run, name, draw, model)


def _shards(run: Run, name: str, draw: Draw, model: Callable[[], LanguageModel]) -> None:
    problems = run.evaluation[draw.set]
    prompts, shape = prepare(run, "teacher" if name == "teacher" else "student", draw)

    def samples(part: Sequence[Problem], tokens: list[int], owner: int) -> list[dict[str, Any]]:
        lm = model()
        with run.work("evaluate", tokens):
            run.progress.doing(f"decoding {len(part) * draw.samples:,} samples")
            rows = ask(run, lm, draw, part, prompts, shape, owner)
            tokens.extend(len(row["tokens"]) for row in rows)
            return [{"model": name, **row} for row in rows]

    total, grades, stage = -(-len(problems) // shape.contexts), Counter[str](), draw.stage(name)
    run.progress.update(stage, 0, total, "shards")
    for number in range(total):
        part = problems[number * shape.contexts : (number + 1) * shape.contexts]
        tokens: list[int] = []
        owner = number % processes.count()
        make = functools.partial(samples, part, tokens, owner)
        table = run.shard("evaluate", f"{draw.folder}/{name}-{number:05d}", make, EVALUATION, owner)
        grades.update(table.column("grade").to_pylist())
        counts, made = {"samples": grades.total(), "grades": dict(grades)}, sum(tokens)
        run.progress.update(stage, number + 1, total, "shards", tokens=made, found=not made, counts=counts)


def _model(run: Run, name: str) -> LanguageModel:
    if name == "teacher":
        return run.teacher
    if name == "student_base":
        return run.student
    student = trained(run, name)
    return student.with_params(merged(student.model))


def problem_means(run: Run, name: str, draw: Draw) -> np.ndarray:
    """Mean correctness of each problem of a draw over its samples by a model: [problems] float64, in their order."""
    found: dict[str, list[bool]] = defaultdict(list)
    shards = [s.rpartition("/") for s in sorted(run.directory.manifest["shards"])]
    for file in (file for folder, _, file in shards if folder == draw.folder and file.startswith(f"{name}-")):
        for row in run.directory.read(f"{draw.folder}/{file}").to_pylist():
            found[row["problem_id"]].append(row["grade"] == "correct")
    return np.array([np.mean(found[p.id]) for p in run.evaluation[draw.set]])


def accuracy(config: Config, problems: Sequence[Problem], values: np.ndarray) -> dict[str, Any]:
    """mean, ci95, n, and the same per level: values [problems]."""
    levels = np.array([p.level for p in problems])

    def figures(part: np.ndarray) -> dict[str, Any]:
        ci95 = interval(part, config.evaluate.resamples, config.seed)
        return {"mean": float(part.mean()), "ci95": ci95, "n": len(part)}

    return {**figures(values), "per_level": {str(name): figures(values[levels == name]) for name in np.unique(levels)}}


def compared(run: Run, draw: Draw) -> dict[str, Any]:
    """The accuracy of each model on a draw, and `difference`: HEAL minus rejection sampling, paired by problem."""
    problems = run.evaluation[draw.set]
    means = {name: problem_means(run, name, draw) for name in MODELS}
    found = {name: accuracy(run.config, problems, values) for name, values in means.items()}
    difference = accuracy(run.config, problems, means["heal"] - means["rejection_sampling"])

    def without_count(figures: dict[str, Any]) -> dict[str, Any]:
        return {name: figures[name] for name in ("mean", "ci95")}

    levels = {name: without_count(part) for name, part in difference["per_level"].items()}
    return found | {"difference": without_count(difference) | {"per_level": levels}}
