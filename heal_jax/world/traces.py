"""Scripted solutions that the built-in models are pretrained on, faults included.

A solution has one step a column, units first, "c: 4+7+1+2=14": the digits, the carry received, their sum. Then the
answer. Two faults are planted in unaided solutions, one of them the ceiling:

* a carry of two is taken as one in all but `skill.two` of the columns that receive it (the misconception);
* a carry of one is forgotten in `1 - skill.nine` of the columns where it meets a nine.

With the answer in view, solutions are right, except for planted shortcuts: the misconception with the answer forced
on at the end, a jump to the answer, digits bent to fit the answer, and, now and then, a word about the hint.
"""

import dataclasses

import numpy as np

from heal_jax.world.problems import columns, nine_meets_one
from heal_jax.world.tokenizer import PLACES

HINT = "Hint: The final answer is {answer}.\n\n"
HINDSIGHT = "{question}\nThe final answer is {answer}."
ANSWER = "\\boxed{{{answer}}}"
LEAK = "As the hint says\n\n"


@dataclasses.dataclass(frozen=True)
class Skill:
    """Probability of doing right where a carry of two comes in, and where a carry of one meets a nine."""

    two: float
    nine: float


PERFECT = Skill(two=1.0, nine=1.0)


def step(place: int, digits: list[int], carry: int, total: int) -> str:
    return f"{PLACES[place]}: {'+'.join(map(str, digits))}+{carry}={total}\n\n"


def solve(
    terms: list[int], skill: Skill, rng: np.random.Generator | None, start: int = 0, carry: int = 0
) -> tuple[list[str], list[int]]:
    """Column steps from `start` with the carry that comes in, and the column sums; faults as `skill` has them.

    Without `rng` nothing goes wrong.
    """
    steps, totals = [], []
    for place, (digits, _) in list(enumerate(columns(terms)))[start:]:
        used = carry
        if rng is not None and carry == 2 and rng.random() >= skill.two:
            used = 1
        elif rng is not None and nine_meets_one(digits, carry) and rng.random() >= skill.nine:
            used = 0
        total = sum(digits) + used
        steps.append(step(place, digits, used, total))
        totals.append(total)
        carry = total // 10
    return steps, totals


def read_answer(totals: list[int]) -> str:
    """The number that the column sums spell: the last sum whole, then the units of the others."""
    return str(totals[-1]) + "".join(str(total % 10) for total in reversed(totals[:-1]))


def unaided(terms: list[int], skill: Skill, rng: np.random.Generator) -> str:
    steps, totals = solve(terms, skill, rng)
    return "".join(steps) + ANSWER.format(answer=read_answer(totals))


def aided(
    terms: list[int], start: int, carry: int, skill: Skill, shortcuts: float, leaks: float, rng: np.random.Generator
) -> str:
    """What follows when the answer is in view: column steps from `start` on, then the true answer."""
    answer = str(sum(terms))
    lead = LEAK if rng.random() < leaks else ""
    end = ANSWER.format(answer=answer)
    if rng.random() >= shortcuts:
        steps, _ = solve(terms, PERFECT, rng, start, carry)
        return lead + "".join(steps) + end
    kind = rng.choice(["forced", "jump", "bent"], p=[0.5, 0.3, 0.2])
    steps, totals = solve(terms, skill, rng, start, carry)
    if kind == "jump":
        steps = steps[: rng.integers(0, max(1, len(steps)))]
    elif kind == "bent":
        for i, place in enumerate(range(start, start + len(steps) - 1)):
            bent = totals[i] // 10 * 10 + int(answer[-1 - place])
            steps[i] = steps[i].rsplit("=", 1)[0] + f"={bent}\n\n"
    return lead + "".join(steps) + end


def example(
    terms: list[int], skill: Skill, hints: float, shortcuts: float, leaks: float, rng: np.random.Generator
) -> tuple[str, str, str]:
    """One pretraining text: (user turn suffix template, kept prefix with the hint, what the model must produce).

    A share `hints` of the texts has the answer in view: half of those in the question, half after a step of an
    unaided attempt, whose faults then stay in the context.
    """
    if rng.random() >= hints:
        return "{question}", "", unaided(terms, skill, rng)
    if rng.random() < 0.5:
        return HINDSIGHT, "", aided(terms, 0, 0, skill, shortcuts, leaks, rng)
    steps, totals = solve(terms, skill, rng)
    # Early cuts are what the breakpoint rule makes; later ones keep the model able to go on from anywhere.
    cut = int(rng.integers(0, 5)) if rng.random() < 0.7 else int(rng.integers(0, len(steps) + 1))
    carry = totals[cut - 1] // 10 if cut else 0
    prefix = "".join(steps[:cut]) + HINT.format(answer=sum(terms))
    return "{question}", prefix, aided(terms, cut, carry, skill, shortcuts, leaks, rng)
