"""What a built-in world is: problems of a reasoning-gym family, how they are solved step by step, what may go wrong.

A world knows one text for each step, plants two weaknesses into it, and can tell a right step from a wrong one. What
is the same in all worlds (splits, levels, hints, shortcuts, the recipe of the models) is in the modules beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

LEVELS = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True)
class Skill:
    """Probability of doing right where a world's hard and where its medium weakness is met."""

    hard: float
    medium: float


PERFECT = Skill(hard=1.0, medium=1.0)


class World(Protocol):
    """Questions are the generator's texts, steps are texts without the blank line after them; the answer is none."""

    name: str
    family: str
    options: Mapping[str, Any]
    """Of the family."""
    tokens: int
    """The longest pretraining text: prompt, kept prefix, hint and solution."""

    def level(self, question: str) -> str | None:
        """easy, medium, hard, or None for what is not used. Raises nothing, whatever the question."""
        ...

    short_tokens: int
    """The longest of those on short questions; 0 where there are none."""

    def draw(self, rng: np.random.Generator, plain: bool, short: bool = False) -> str:
        """A question for pretraining, of any split; `plain`: one without the hard weakness; `short`: a short one, which
        teaches the same for less, where there are such.
        """
        ...

    def answer(self, question: str) -> str:
        """The right answer."""
        ...

    def solve(
        self, question: str, skill: Skill, rng: np.random.Generator | None, done: Sequence[str] = ()
    ) -> list[str]:
        """The steps after those done, right or wrong as they may be; faults as `skill` has them, none without `rng`."""
        ...

    def read(self, question: str, steps: Sequence[str]) -> str:
        """The answer that all steps of a solution lead to."""
        ...

    def bend(self, question: str, done: int, steps: Sequence[str]) -> list[str]:
        """Steps after `done` others, one or more of them changed so that they seem to lead to the right answer."""
        ...

    def follows(self, question: str, done: Sequence[str], step: str) -> bool:
        """Whether `step` is a right next step, and not the answer, after steps that are right."""
        ...

    def finished(self, question: str, done: Sequence[str]) -> bool:
        """Whether nothing but the answer can follow steps that are right."""
        ...

    def corrupt(self, step: str, rng: np.random.Generator) -> str:
        """The step with another result, well-formed."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Its vocabulary; see `heal_jax.world.tokenizer`."""
        ...
