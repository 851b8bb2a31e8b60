"""Accuracy of teacher and students on held-out problems, with bootstrap intervals."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from heal_jax import processes
from heal_jax.curriculum import train_one, training_plan
from heal_jax.model.lm import LanguageModel
from heal_jax.model.lora import merged
from heal_jax.problems.sources import Problem
from heal_jax.rollout.generate import Group, generate
from heal_jax.rollout.sampling import rules
from heal_jax.run import Run, plain_prompts
from heal_jax.shapes import evaluate_shape
from heal_jax.store import EVALUATION

MODELS = ("teacher", "student_base", "rejection_sampling", "heal")


def evaluate(run: Run) -> None:
    """`evaluate.samples` rollouts of every held-out problem by each of the four models: evaluation/*.parquet.

    All models get the same random keys, so that their differences are less noisy than their accuracies.
    """
    for model in MODELS:
        evaluate_one(run, model)
        run.release_teacher()
    run.directory.finish("evaluate", samples=run.config.evaluate.samples)


def trained(run: Run, name: str) -> LanguageModel:
    """A student after training, from its checkpoint; with LoRA its adapters are beside its weights."""
    phases, length = training_plan(run)
    return run.student.with_params(train_one(run, name, phases[name], length).model)


def evaluate_one(run: Run, name: str) -> None:
    spec, k, most = run.config.evaluate, run.config.evaluate.samples, run.config.sample.max_new_tokens
    model = functools.cache(lambda: _model(run, name))  # opened by the first shard that is missing
    # Each model with its own tokenizer, chat template and EOS.
    prompts = plain_prompts(run.config, run.tokenizers["teacher" if name == "teacher" else "student"], run.held_out)
    shape = evaluate_shape(run.config, len(run.held_out), max(map(len, prompts.values())))
    drawn = rules(dataclasses.replace(run.config.sample, temperature=spec.temperature))

    def samples(part: Sequence[Problem], tokens: list[int], owner: int) -> list[dict[str, Any]]:
        lm = model()
        with run.work("evaluate", tokens):
            ids = {p.id: tuple(f"{p.id}/evaluate/{i}/s{run.config.seed}" for i in range(k)) for p in part}
            groups = [Group(prompts[p.id], ids[p.id], most) for p in part]
            decoded = [d for several in generate(lm, groups, shape, drawn) for d in several]
            tokens.extend(len(d.tokens) for d in decoded)
            problems = [p for p in part for _ in range(k)]
            texts = [lm.tokenizer.text(list(d.tokens)) for d in decoded]
            grades = run.grade([(p, text, d.finish) for p, text, d in zip(problems, texts, decoded)], owner)
            return [
                {"model": name, "problem_id": p.id, "sample": i % k, "tokens": d.tokens, "grade": grade.grade}
                for i, (p, d, grade) in enumerate(zip(problems, decoded, grades))
            ]

    total, correct, seen = -(-len(run.held_out) // shape.contexts), 0, 0
    for number in range(total):
        part = run.held_out[number * shape.contexts : (number + 1) * shape.contexts]
        tokens: list[int] = []
        owner = number % processes.count()
        make = functools.partial(samples, part, tokens, owner)
        table = run.shard("evaluate", f"evaluation/{name}-{number:05d}", make, EVALUATION, owner)
        grades = table.column("grade").to_pylist()
        correct, seen = correct + grades.count("correct"), seen + len(grades)
        run.progress.update(f"evaluate {name}", number + 1, total, f"{correct / seen:.1%} correct", sum(tokens))


def _model(run: Run, name: str) -> LanguageModel:
    if name == "teacher":
        return run.teacher
    if name == "student_base":
        return run.student
    student = trained(run, name)
    return student.with_params(merged(student.model))


def problem_means(run: Run, name: str) -> np.ndarray:
    """Mean correctness of each held-out problem over its samples: [problems] float64, in the order of `held_out`."""
    found: dict[str, list[bool]] = defaultdict(list)
    for shard in sorted(s for s in run.directory.manifest["shards"] if s.startswith(f"evaluation/{name}-")):
        for row in run.directory.read(shard).to_pylist():
            found[row["problem_id"]].append(row["grade"] == "correct")
    return np.array([np.mean(found[p.id]) for p in run.held_out])


def interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile-bootstrap interval of the mean over problems: values [problems] -> [low, high].

    Resampling problems (not samples) keeps the dependence between the samples of one problem.
    """
    rng = np.random.default_rng([seed, len(values)])
    means = values[rng.integers(0, len(values), size=(resamples, len(values)))].mean(axis=1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def accuracy(run: Run, values: np.ndarray) -> dict[str, Any]:
    """mean, ci95, n, and the same per level: values [problems] in the order of `held_out`."""
    spec = run.config.evaluate
    levels = np.array([p.level for p in run.held_out])

    def figures(part: np.ndarray) -> dict[str, Any]:
        ci95 = interval(part, spec.resamples, run.config.seed)
        return {"mean": float(part.mean()), "ci95": ci95, "n": len(part)}

    names = dict.fromkeys(p.level for p in sorted(run.held_out, key=lambda p: p.level))
    return {**figures(values), "per_level": {name: figures(values[levels == name]) for name in names}}
