"""Problems put to a model: samples of each, graded; accuracy on the dev problems, by which checkpoints are chosen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from heal_jax.config import DEV
from heal_jax.model.lm import LanguageModel
from heal_jax.problems.sources import Problem
from heal_jax.rollout.generate import Group, generate
from heal_jax.rollout.sampling import rules
from heal_jax.run import Run
from heal_jax.sets import Draw, draw_of, widest
from heal_jax.shapes import Shape, evaluate_shape

Prompts = Mapping[str, tuple[int, ...]]


def prepare(run: Run, model: str, draw: Draw) -> tuple[Prompts, Shape]:
    """The prompts of a draw's problems, by id, and the shape of its shards; `model`: teacher or student, each of which
    has its own tokenizer and chat template.
    """
    prompts = run.evaluation_prompts[model]
    longest = {name: max(map(len, several.values())) for name, several in prompts.items()}
    of_set = prompts[draw.set]
    return of_set, evaluate_shape(run.config, draw, len(of_set), widest(run.config, draw, longest))


def ask(
    run: Run, lm: LanguageModel, draw: Draw, part: Sequence[Problem], prompts: Prompts, shape: Shape, owner: int
) -> list[dict[str, Any]]:
    """problem_id, sample, tokens [n] int32 and grade of each sample of a shard's problems, one problem after another.

    A sample's randomness is keyed by problem, index and seed: models are compared by the same keys, which makes their
    differences less noisy than their accuracies.
    """
    keys = {p.id: tuple(f"{p.id}/evaluate/{i}/s{run.config.seed}" for i in range(draw.samples)) for p in part}
    groups = [Group(prompts[p.id], keys[p.id], draw.max_new_tokens) for p in part]
    drawn = rules(dataclasses.replace(run.config.sample, temperature=draw.temperature))
    decoded = [d for several in generate(lm, groups, shape, drawn) for d in several]
    problems = [p for p in part for _ in range(draw.samples)]
    texts = [lm.tokenizer.text(list(d.tokens)) for d in decoded]
    grades = run.grade([(p, text, d.finish) for p, text, d in zip(problems, texts, decoded)], owner)
    return [
        {"problem_id": p.id, "sample": i % draw.samples, "tokens": d.tokens, "grade": grade.grade}
        for i, (p, d, grade) in enumerate(zip(problems, decoded, grades))
    ]


def dev_accuracy(run: Run, student: LanguageModel) -> float:
    """pass@1 of a student on the problems of `evaluate.dev`: the share of right samples. With LoRA, of a merged one.

    The same weights give the same figure, whatever was computed before; nothing is written. All processes of a run call
    it together. Raises ValueError where the run has no dev problems.
    """
    if DEV not in run.evaluation:
        raise ValueError("evaluate.dev names no source of problems")
    draw, problems = draw_of(run.config, DEV), run.evaluation[DEV]
    prompts, shape = prepare(run, "student", draw)
    grades = [
        row["grade"]
        for start in range(0, len(problems), shape.contexts)
        for row in ask(run, student, draw, problems[start : start + shape.contexts], prompts, shape, owner=0)
    ]
    return grades.count("correct") / len(grades)
