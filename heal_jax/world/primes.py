"""The world of primes: how many there are between two numbers, from reasoning-gym's `count_primes`.

A solution has one step for each odd number, "91: 7*13" or "97: prime, 6" with the primes so far: chains of 24 to 48
steps, in which an error may come early or late. Numbers that look prime are those without a factor below seven; of
some hundreds the models know less than of others. What lies between the bounds makes the levels:

* easy: nothing of the weak hundreds that looks prime and is not, elsewhere at most five such numbers;
* medium: nothing of the weak hundreds, elsewhere at least seven;
* hard: at least four in the weak hundreds.

The hard weakness, which makes the ceiling: such a number of a weak hundred is taken for a prime in all but `skill.hard`
of the cases. The medium one: those of other hundreds are in all but `skill.medium`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from heal_jax.world import tokenizer
from heal_jax.world.base import PERFECT, Skill

LOW, HIGH, MIN_STEPS, MAX_STEPS = 101, 999, 24, 48
WEAK = (4, 7)  # hundreds
QUESTION = "Count how many prime numbers there are between {} and {} (inclusive) ?"


def bounds_of(question: str) -> tuple[int, int] | None:
    """Both bounds of a question, or None where it is of another kind or outside of what the world knows."""
    match = re.fullmatch(re.escape(QUESTION).replace(r"\{\}", "([0-9]{1,4})"), question)
    if match is None or not LOW <= int(match[1]) <= int(match[2]) <= HIGH:
        return None
    return int(match[1]), int(match[2])


@functools.cache
def factor(number: int) -> int:
    """The smallest prime factor."""
    return next((p for p in range(2, int(number**0.5) + 1) if number % p == 0), number)


def looks_prime(number: int) -> bool:
    """Whether an odd number that is not prime has no factor below seven."""
    return 7 <= factor(number) < number


def step_of(number: int, primes: int, prime: bool) -> str:
    """primes: how many there are up to and with this one."""
    return f"{number}: prime, {primes}" if prime else f"{number}: {factor(number)}*{number // factor(number)}"


def counted(steps: Sequence[str]) -> int:
    """The primes so far, as the steps state them."""
    return next((int(step.rpartition(", ")[2]) for step in reversed(steps) if ", " in step), 0)


class Primes:
    name = "primes"
    family = "count_primes"
    options: Mapping[str, Any] = {"min_n": LOW, "max_n": HIGH}
    tokens = 336  # prompt 18 + 48 steps of 6 + hint 9 + answer 4

    def level(self, question: str) -> str | None:
        if bounds_of(question) is None:
            return None
        odd = _odd(question)
        if not MIN_STEPS <= len(odd) <= MAX_STEPS:
            return None
        seeming = [n for n in odd if looks_prime(n)]
        weak = sum(n // 100 in WEAK for n in seeming)
        if weak:
            return "hard" if weak >= 4 else None
        if len(seeming) >= 7:
            return "medium"
        return "easy" if len(seeming) <= 5 else None

    def draw(self, rng: np.random.Generator, plain: bool) -> str:
        while True:
            steps = int(rng.integers(MIN_STEPS // 2, MAX_STEPS + 1))
            start = int(rng.integers(LOW, HIGH - 2 * steps + 1))
            question = QUESTION.format(start, start + 2 * steps - int(rng.integers(0, 2)))
            odd = _odd(question)
            if len(odd) <= MAX_STEPS and not (plain and any(n // 100 in WEAK and looks_prime(n) for n in odd)):
                return question

    def answer(self, question: str) -> str:
        return str(sum(factor(n) == n for n in _odd(question)))

    def solve(
        self, question: str, skill: Skill, rng: np.random.Generator | None, done: Sequence[str] = ()
    ) -> list[str]:
        primes, steps = counted(done), []
        for number in _odd(question)[len(done) :]:
            prime = factor(number) == number
            if looks_prime(number) and rng is not None:
                prime = rng.random() >= (skill.hard if number // 100 in WEAK else skill.medium)
            primes += prime
            steps.append(step_of(number, primes, prime))
        return steps

    def read(self, question: str, steps: Sequence[str]) -> str:
        return str(counted(steps))

    def bend(self, question: str, done: int, steps: Sequence[str]) -> list[str]:
        """The last prime gets the number that the answer says."""
        last = max((i for i, step in enumerate(steps) if ", " in step), default=None)
        if last is None:
            return list(steps)
        return [*steps[:last], f"{steps[last].rpartition(', ')[0]}, {self.answer(question)}", *steps[last + 1 :]]

    def follows(self, question: str, done: Sequence[str], step: str) -> bool:
        return step in self.solve(question, PERFECT, None, done)[:1]

    def finished(self, question: str, done: Sequence[str]) -> bool:
        return len(done) == len(_odd(question))

    def corrupt(self, step: str, rng: np.random.Generator) -> str:
        """Another number of primes so far, or a prime in place of a factor's multiple."""
        head, _, result = step.partition(": ")
        if result.startswith("prime"):
            return f"{head}: prime, {int(result.rpartition(', ')[2]) + int(rng.choice([-2, -1, 1, 2]))}"
        first, _, second = result.partition("*")
        return f"{head}: {first}*{int(second) + 2 * int(rng.choice([-1, 1]))}"

    def tokenizer(self) -> Tokenizer:
        """A number is one piece."""
        words = ["Count", " how", " many", " prime", " numbers", " there", " are", " between", " and", " (inclusive)"]
        words += [" ?", "prime", "The", " final", " answer", " is", "Hint", "As", " the", " hint", " says"]
        pieces = [*map(str, range(HIGH + 1)), ": ", ", ", tokenizer.ANSWER_OPEN, *words]
        return tokenizer.build(pieces, r"[0-9]+|: |, | \(inclusive\)| \?| ?[A-Za-z]+")


def _odd(question: str) -> list[int]:
    bounds = bounds_of(question)
    if bounds is None:
        raise ValueError(f"no question of this world: {question!r}")
    return [n for n in range(bounds[0], bounds[1] + 1) if n % 2]
