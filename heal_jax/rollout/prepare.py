"""What `heal_round` is given, from problems as text."""

from collections.abc import Sequence

import numpy as np

from heal_jax.config import Config
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.problems.answers import answer_tokens
from heal_jax.problems.sources import Problem
from heal_jax.rollout.generate import key_of, pad_rows
from heal_jax.rollout.heal_round import Problems
from heal_jax.rollout.steps import columns
from heal_jax.run import hint_text, plain_question
from heal_jax.shapes import bucket


def prepare(config: Config, tokenizer: Tokenizer, problems: Sequence[Problem]) -> Problems:
    """The arrays of a round over these problems, with the keys that the stages use: the same rollouts come out."""
    n, repairs, seed = config.sample.n, config.gear.repairs, config.seed
    prompts = [tokenizer.prompt(plain_question(config, p)) for p in problems]
    hints = [tokenizer.encode(hint_text(config, p)) for p in problems]
    marks = config.grade.answer_open, config.grade.answer_close
    answers = [tokenizer.encode(marks[0] + p.answer + marks[1]) for p in problems]
    padded = [pad_rows(rows, bucket(max(map(len, rows))), len(problems)) for rows in (prompts, hints, answers)]
    base = [[f"{p.id}/base/{i}/s{seed}" for i in range(n)] for p in problems]

    def repair_keys(problem: Problem) -> list[list[np.ndarray]]:
        return [[key_of(f"{problem.id}/repair/{i}.{j}/s{seed}") for j in range(repairs)] for i in range(n)]

    arrays = [
        *(array for pair in padded for array in pair),
        np.array([answer_tokens(tokenizer.spans(ids), *marks) or (0, len(ids)) for ids in answers], np.int32),
        np.array([[key_of(name) for name in names] for names in base]),
        np.array([[key_of(name + "/breakpoint") for name in names] for names in base]),
        np.array([repair_keys(p) for p in problems]),
    ]
    return Problems._make([*arrays, columns(tokenizer.newlines)])
