"""Step checking for the built-in worlds: what a scientist needs and the method never sees."""

from heal_jax.world.base import World
from heal_jax.world.traces import ANSWER


def steps_of(text: str) -> list[str]:
    """The steps of a solution, the answer last."""
    return [step.strip() for step in text.split("\n\n") if step.strip()]


def first_wrong_step(world: World, question: str, text: str) -> int | None:
    """Index of the first step that is wrong, one past the last where the answer is missing; None where all is right."""
    steps = steps_of(text)
    for k, step in enumerate(steps):
        done = steps[:k]
        if world.finished(question, done):
            if step != ANSWER.format(answer=world.answer(question)):
                return k
            return None if k == len(steps) - 1 else k + 1
        if not world.follows(question, done, step):
            return k
    return len(steps)
