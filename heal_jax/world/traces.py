"""Scripted solutions that the built-in models are pretrained on, faults included.

Unaided solutions have a world's planted faults, as often as the skill says. With the answer in view, solutions are
right, except for planted shortcuts: the usual faults with the answer forced on at the end, a jump to the answer, steps
bent to fit the answer, and, now and then, a word about the hint.
"""

import dataclasses

import numpy as np

from heal_jax.world.base import PERFECT, Skill, World

HINT = "Hint: The final answer is {answer}.\n\n"
HINDSIGHT = "{question}\nThe final answer is {answer}."
ANSWER = "\\boxed{{{answer}}}"
LEAK = "As the hint says\n\n"


@dataclasses.dataclass(frozen=True)
class Aid:
    """How often the answer is in view, a shortcut is taken then, and a word said about the hint."""

    hints: float
    shortcuts: float = 0.25
    leaks: float = 0.03


def text_of(steps: list[str]) -> str:
    return "".join(step + "\n\n" for step in steps)


def unaided(world: World, question: str, skill: Skill, rng: np.random.Generator) -> str:
    steps = world.solve(question, skill, rng)
    return text_of(steps) + ANSWER.format(answer=world.read(question, steps))


def aided(world: World, question: str, done: list[str], skill: Skill, aid: Aid, rng: np.random.Generator) -> str:
    """What follows when the answer is in view: steps after those done, then the true answer."""
    lead = LEAK if rng.random() < aid.leaks else ""
    end = ANSWER.format(answer=world.answer(question))
    if rng.random() >= aid.shortcuts:
        return lead + text_of(world.solve(question, PERFECT, rng, done)) + end
    kind = rng.choice(["forced", "jump", "bent"], p=[0.5, 0.3, 0.2])
    steps = world.solve(question, skill, rng, done)
    if kind == "jump":
        steps = steps[: rng.integers(0, max(1, len(steps)))]
    elif kind == "bent":
        steps = world.bend(question, len(done), steps)
    return lead + text_of(steps) + end


def example(world: World, question: str, skill: Skill, aid: Aid, rng: np.random.Generator) -> tuple[str, str, str]:
    """One pretraining text: (user turn suffix template, kept prefix with the hint, what the model must produce).

    A share `aid.hints` of the texts has the answer in view: half of those in the question, half after a step of an
    unaided attempt, whose faults then stay in the context.
    """
    if rng.random() >= aid.hints:
        return "{question}", "", unaided(world, question, skill, rng)
    if rng.random() < 0.5:
        return HINDSIGHT, "", aided(world, question, [], skill, aid, rng)
    steps = world.solve(question, skill, rng)
    # Cuts in the first third are what the breakpoint rule makes; later ones keep the model able to go on from anywhere.
    early = -(-len(steps) // 3) + 1
    cut = int(rng.integers(0, early)) if rng.random() < 0.7 else int(rng.integers(0, len(steps) + 1))
    prefix = text_of(steps[:cut]) + HINT.format(answer=world.answer(question))
    return "{question}", prefix, aided(world, question, steps[:cut], skill, aid, rng)
