"""The world of sums: three long numbers added column by column, from reasoning-gym's `chain_sum`.

A solution has one step a column, units first, "c: 4+7+1+2=14": the digits, the carry received, their sum. What columns
ask for makes the levels:

* easy: no column receives a carry of two, at most one receives a carry of one next to a nine;
* medium: no carry of two, at least three columns receive a carry of one next to a nine;
* hard: at least four columns receive a carry of two.

The hard weakness, which makes the ceiling: a carry of two is taken as one in all but `skill.hard` of the columns that
receive it. The medium one: a carry of one is forgotten in all but `skill.medium` of the columns where it meets a nine.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from heal_jax.world import tokenizer
from heal_jax.world.base import PERFECT, Skill

TERMS, MIN_DIGITS, MAX_DIGITS = 3, 11, 12
COLUMNS = "abcdefghijklmn"  # labels of the columns in a solution: units, tens, ...


def question_of(terms: Sequence[int]) -> str:
    """The generator's wording."""
    return f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="


def terms_of(question: str) -> list[int] | None:
    """The summands of a question, or None where it is not a plain sum."""
    expression = question.rsplit(":", 1)[-1].strip().removesuffix("=").strip()
    if not re.fullmatch(r"[0-9]+( \+ [0-9]+)+", expression):
        return None
    return [int(term) for term in expression.split(" + ")]


def columns(terms: Sequence[int]) -> list[tuple[list[int], int]]:
    """For each column, units first: its digits (one a term) and the carry it receives."""
    carry, out = 0, []
    for place in range(len(str(max(terms)))):
        digits = [term // 10**place % 10 for term in terms]
        out.append((digits, carry))
        carry = (sum(digits) + carry) // 10
    return out


def nine_meets_one(digits: Sequence[int], carry: int) -> bool:
    """The medium weakness: a carry of one into a column that holds a nine."""
    return carry == 1 and 9 in digits


def total_of(step: str) -> int:
    """The column sum that a step states."""
    return int(step.rpartition("=")[2])


class Sums:
    name = "sums"
    family = "chain_sum"
    options: Mapping[str, Any] = {
        "min_terms": TERMS, "max_terms": TERMS, "min_digits": MIN_DIGITS, "max_digits": MAX_DIGITS
    }  # fmt: skip
    tokens = 208  # prompt 56 + 4 columns of 9 + hint 20 + 8 columns + answer 16
    short_tokens = 0

    def level(self, question: str) -> str | None:
        terms = terms_of(question)
        if terms is None:
            return None
        cells = columns(terms)
        twos = sum(carry == 2 for _, carry in cells)
        nines = sum(nine_meets_one(digits, carry) for digits, carry in cells)
        if twos:
            return "hard" if twos >= 4 else None
        if nines >= 3:
            return "medium"
        return "easy" if nines <= 1 else None

    def draw(self, rng: np.random.Generator, plain: bool, short: bool = False) -> str:
        while True:
            # One digit less than the problems have, so that their shortest are not at the edge of what was learned.
            digits = int(rng.integers(MIN_DIGITS - 1, MAX_DIGITS + 1))
            terms = [int(x) for x in rng.integers(10 ** (digits - 1), 10**digits, size=TERMS)]
            if not plain or all(carry < 2 for _, carry in columns(terms)):
                return question_of(terms)

    def answer(self, question: str) -> str:
        return str(sum(_terms(question)))

    def solve(
        self, question: str, skill: Skill, rng: np.random.Generator | None, done: Sequence[str] = ()
    ) -> list[str]:
        carry = total_of(done[-1]) // 10 if done else 0
        steps = []
        for place, (digits, _) in list(enumerate(columns(_terms(question))))[len(done) :]:
            used = carry
            if rng is not None and carry == 2 and rng.random() >= skill.hard:
                used = 1
            elif rng is not None and nine_meets_one(digits, carry) and rng.random() >= skill.medium:
                used = 0
            total = sum(digits) + used
            steps.append(f"{COLUMNS[place]}: {'+'.join(map(str, digits))}+{used}={total}")
            carry = total // 10
        return steps

    def read(self, question: str, steps: Sequence[str]) -> str:
        """The number that the column sums spell: the last sum whole, then the units of the others."""
        totals = [total_of(step) for step in steps]
        return str(totals[-1]) + "".join(str(total % 10) for total in reversed(totals[:-1]))

    def bend(self, question: str, done: int, steps: Sequence[str]) -> list[str]:
        """Units of all sums but the last are the answer's digits."""
        answer, bent = self.answer(question), list(steps)
        for i, step in enumerate(steps[:-1]):
            units = int(answer[-1 - done - i])
            bent[i] = f"{step.rpartition('=')[0]}={total_of(step) // 10 * 10 + units}"
        return bent

    def follows(self, question: str, done: Sequence[str], step: str) -> bool:
        return step in self.solve(question, PERFECT, None, done)[:1]

    def finished(self, question: str, done: Sequence[str]) -> bool:
        return len(done) == len(columns(_terms(question)))

    def corrupt(self, step: str, rng: np.random.Generator) -> str:
        """Another last digit of the sum."""
        return step[:-1] + str((int(step[-1]) + int(rng.integers(1, 10))) % 10)

    def tokenizer(self) -> Tokenizer:
        """Digits know their place."""
        words = ["State", " the", " final", " answer", " to", " following", " arithmetic", " problem", "The", " is"]
        words += ["Hint", "As", " hint", " says", "What", "Add", "Compute"]
        places = tokenizer.PLACES
        pieces = [*places, *(f"{d}{tag}" for tag in places for d in range(10))]
        pieces += [f"+{d}{places[0]}" for d in range(10)]
        pieces += [f"{place}: " for place in COLUMNS] + [": ", " + ", " - ", " =", tokenizer.ANSWER_OPEN, *words]
        pattern = rf"[{COLUMNS}]: |: | [+=-] ?|\+[0-9][{places}]?|[0-9][{places}]?| ?[A-Za-z]+"
        return tokenizer.know_places(tokenizer.build(pieces, pattern))


def _terms(question: str) -> list[int]:
    terms = terms_of(question)
    if terms is None:
        raise ValueError(f"not a sum: {question!r}")
    return terms
