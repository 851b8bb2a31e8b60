"""The world of legs: how many a list of animals has, from reasoning-gym's `leg_counting`.

A solution has one step an animal, "4 crabs: +40 = 132": its legs, and those so far. Chains are of 30 to 34 steps, in
which an error may come early or late. The models know little of the legs of some animals when there are many of them:

* easy: no animal with ten or more legs is there `MANY` times, at most one with five or eight is;
* medium: none with ten or more, at least two with five or eight;
* hard: at least two with ten or more.

The hard weakness, which makes the ceiling: such an animal of ten or more legs is counted with eight in all but
`skill.hard` of the cases. The medium one: one of five is counted with four, and one of eight with six, in all but
`skill.medium`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from heal_jax.world import tokenizer
from heal_jax.world.base import PERFECT, Skill

MIN_ANIMALS, MAX_ANIMALS, MOST = 30, 34, 4  # of one animal: MOST
MANY = 3
SHORT = 8  # animals of a short question
DIGITS = 4  # at most, of a number
HEAD = """Your task is to count how many legs there are in total when given a list of animals.

Now, how many legs are there in total if you have """
TAIL = "?\n"
LESS = {5: 4, 8: 6, 10: 8, 14: 8}  # legs, and those that a weak model counts instead

Herd = list[tuple[str, int]]  # animals and how many there are, in the order of the question


@functools.cache
def animals() -> dict[str, int]:
    """The generator's animals and their legs. It is imported when it is called: that takes two seconds."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS


def question_of(herd: Herd) -> str:
    """The generator's wording."""
    return HEAD + ", ".join(named(animal, count) for animal, count in herd) + TAIL


def named(animal: str, count: int) -> str:
    return f"{count} {animal}{'s' if count > 1 else ''}"


def herd_of(question: str) -> Herd | None:
    """The animals of a question, or None where it is of another kind."""
    if not question.startswith(HEAD) or not question.endswith(TAIL):
        return None
    herd = []
    for said in question.removeprefix(HEAD).removesuffix(TAIL).split(", "):
        match = re.fullmatch(r"([0-9]{1,2}) ([a-z ]+)", said)
        animal = match[2].removesuffix("s" if int(match[1]) > 1 else "") if match else ""
        if match is None or animal not in animals() or not 1 <= int(match[1]) <= MOST:
            return None
        herd.append((animal, int(match[1])))
    return herd


def weak(animal: str, count: int) -> str | None:
    """Which weakness an animal meets: hard, medium or none."""
    if count < MANY or animals()[animal] not in LESS:
        return None
    return "hard" if animals()[animal] >= 10 else "medium"


def total_of(step: str) -> int:
    """The legs so far that a step states."""
    return int(step.rpartition(" = ")[2])


class Legs:
    name = "legs"
    family = "leg_counting"
    options: Mapping[str, Any] = {
        "min_animals": MIN_ANIMALS, "max_animals": MAX_ANIMALS, "min_instances": 1, "max_instances": MOST
    }  # fmt: skip
    tokens = 368  # prompt 4 + 2 * 34, hint 15, 34 steps of 8, answer 6
    short_tokens = 120

    def level(self, question: str) -> str | None:
        herd = herd_of(question)
        if herd is None or not MIN_ANIMALS <= len(herd) <= MAX_ANIMALS:
            return None
        met = [weak(animal, count) for animal, count in herd]
        if hard := met.count("hard"):
            return "hard" if hard >= 2 else None
        return "medium" if met.count("medium") >= 2 else "easy"

    def draw(self, rng: np.random.Generator, plain: bool, short: bool = False) -> str:
        names = list(animals())
        fewest, most = (SHORT // 2, SHORT) if short else (MIN_ANIMALS - 2, MAX_ANIMALS)
        while True:
            chosen = rng.permutation(len(names))[: int(rng.integers(fewest, most + 1))]
            herd = [(names[i], int(rng.integers(1, MOST + 1))) for i in chosen]
            if not (plain and any(weak(*kind) == "hard" for kind in herd)):
                return question_of(herd)

    def answer(self, question: str) -> str:
        return str(sum(count * animals()[animal] for animal, count in _herd(question)))

    def solve(
        self, question: str, skill: Skill, rng: np.random.Generator | None, done: Sequence[str] = ()
    ) -> list[str]:
        total, steps = total_of(done[-1]) if done else 0, []
        for animal, count in _herd(question)[len(done) :]:
            legs, met = animals()[animal], weak(animal, count)
            if rng is not None and met and rng.random() >= getattr(skill, met):
                legs = LESS[legs]
            total += count * legs
            steps.append(f"{named(animal, count)}: +{count * legs} = {total}")
        return steps

    def read(self, question: str, steps: Sequence[str]) -> str:
        return str(total_of(steps[-1])) if steps else "0"

    def bend(self, question: str, done: int, steps: Sequence[str]) -> list[str]:
        """The last step has the answer for its total."""
        return [*steps[:-1], *(f"{step.rpartition(' = ')[0]} = {self.answer(question)}" for step in steps[-1:])]

    def follows(self, question: str, done: Sequence[str], step: str) -> bool:
        return step in self.solve(question, PERFECT, None, done)[:1]

    def finished(self, question: str, done: Sequence[str]) -> bool:
        return len(done) == len(_herd(question))

    def corrupt(self, step: str, rng: np.random.Generator) -> str:
        """Another last digit of the total."""
        return step[:-1] + str((int(step[-1]) + int(rng.integers(1, 10))) % 10)

    def tokenizer(self) -> Tokenizer:
        """What is added in a step is one piece, an animal another. Digits know their place, and those of the legs so
        far that they are: after a hint, which is a number as well, they are found all the same.
        """
        words = ["The", " final", " answer", " is", "Hint", "As", " the", " hint", " says"]
        counts = [tokenizer.placed(str(count)) for count in range(1, MOST + 1)]
        sums = {count * legs for legs in {*animals().values(), *LESS.values()} for count in range(1, MOST + 1)}
        added = [": +" + tokenizer.placed(str(n)) for n in sorted(sums)]
        places = tokenizer.PLACES[: 2 * DIGITS]
        pieces = [HEAD, TAIL, *tokenizer.PLACES, *(f"{d}{place}" for place in places for d in range(10))]
        pieces += [*(f", {count}" for count in counts), *added, " = ", ": ", tokenizer.ANSWER_OPEN, *words]
        pieces += [named(animal, count)[1:] for animal in animals() for count in (1, 2)]
        digit = f"[0-9][{places}]"
        texts = "|".join(map(tokenizer.literal, (HEAD, TAIL)))
        pattern = rf"{texts}|: \+({digit})+|, {digit}|{digit}| = |: | (sea|praying) [a-z]+| ?[A-Za-z]+"
        ends = [*map(tokenizer.by_digit, range(DIGITS)), *map(_end_in_total, range(DIGITS))]
        return tokenizer.know_places(tokenizer.build(pieces, pattern), ends)


def _end_in_total(place: int) -> str:
    """Where a digit of that place ends in a number after " = ", whose higher digits have their letters already."""
    before = "|".join(" = " + "[0-9]." * higher + "[0-9]" for higher in range(DIGITS))
    return rf"(?<={before})(?=[0-9]{{{place}}}(?![0-9{tokenizer.PLACES}]))"


def _herd(question: str) -> Herd:
    herd = herd_of(question)
    if herd is None:
        raise ValueError(f"no list of animals: {question!r}")
    return herd
