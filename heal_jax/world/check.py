"""Step checking for the built-in world: what a scientist needs and the method never sees."""

from heal_jax.world.problems import terms_of
from heal_jax.world.traces import ANSWER, PERFECT, solve


def perfect_steps(question: str) -> list[str]:
    """The steps of the one flawless solution, the answer last; empty for a question that is not a plain sum."""
    terms = terms_of(question)
    if terms is None:
        return []
    steps, _ = solve(terms, PERFECT, None)
    return [step.strip() for step in steps] + [ANSWER.format(answer=sum(terms))]


def first_wrong_step(question: str, text: str) -> int | None:
    """Index of the first step that differs from the flawless solution, None where every step is right."""
    right = perfect_steps(question)
    steps = [step.strip() for step in text.split("\n\n") if step.strip()]
    for k, step in enumerate(steps):
        if k >= len(right) or step != right[k]:
            return k
    return None if len(steps) == len(right) else len(steps)
