"""The world of rewriting: A::B programs, from reasoning-gym's `ab`.

A program is a row of tokens, `A#`, `B#` (looking right) and `#A`, `#B` (looking left). Two neighbours that look at each
other vanish where they are of one letter and change places otherwise, until none are left. A step of a solution,
"3: A# #B", says which token met the next one, and the program after that rewriting. In which order neighbours are
rewritten is free, and the end is the same: a problem has as many right solutions as orders, and nothing but the rules
tells a right step. What meets makes the levels:

* easy: no `B#` meets an `#A`, at most one `A#` meets a `#B`;
* medium: no `B#` meets an `#A`, at least three `A#` meet a `#B`;
* hard: at least three `B#` meet an `#A`.

The hard weakness, which makes the ceiling: `B#` and `#A` vanish in all but `skill.hard` of their meetings. The medium
one: `A#` and `#B` do in all but `skill.medium` of theirs.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from heal_jax.world import tokenizer
from heal_jax.world.base import Skill

LENGTH, MIN_STEPS, MAX_STEPS = 14, 5, 16
HEAD = """A::B is a system with 4 tokens: `A#`, `#A`, `B#` and `#B`.

An A::B program is a sequence of tokens. Example:

    B# A# #B #A B#

To *compute* a program, we must rewrite neighbor tokens, using the rules:

    A# #A ... becomes ... nothing
    A# #B ... becomes ... #B A#
    B# #A ... becomes ... #A B#
    B# #B ... becomes ... nothing

In other words, whenever two neighbor tokens have their '#' facing each-other,
they must be rewritten according to the corresponding rule.

Now, consider the following program:

"""
TAIL = "Return the final state of the program.\n"
TOKENS = ("A#", "#A", "B#", "#B")
TOKEN = "(?:[AB]#|#[AB])"
NOTHING = "nothing"  # how a step says that no token is left

Program = tuple[str, ...]


def question_of(program: Program) -> str:
    """The generator's wording."""
    return f"{HEAD}{' '.join(program)}\n\n{TAIL}"


def program_of(question: str) -> Program | None:
    """The program of a question, or None where it is of another kind."""
    head, _, tail = question.removeprefix(HEAD).partition("\n\n")
    if not question.startswith(HEAD) or tail != TAIL:
        return None
    program = tuple(head.split(" "))
    return program if set(program) <= set(TOKENS) else None


def meetings(program: Program) -> list[int]:
    """Where two neighbours look at each other: the index of the left one."""
    return [i for i, (a, b) in enumerate(zip(program, program[1:])) if a[1] == "#" == b[0]]


def rewritten(program: Program, at: int, vanish: bool = False) -> Program:
    """The program after one rewriting; `vanish`: of tokens that should change places."""
    left, right = program[at : at + 2]
    between = () if vanish or left[0] == right[1] else (right, left)
    return program[:at] + between + program[at + 2 :]


def text(program: Program) -> str:
    return " ".join(program) or NOTHING


def step_of(at: int, program: Program) -> str:
    """at: which token met the next one, before."""
    return f"{at + 1}: {text(program)}"


def state(step: str) -> Program:
    """The program that a step states."""
    said = step.rpartition(": ")[2]
    return () if said == NOTHING else tuple(said.split(" "))


@functools.lru_cache(maxsize=4096)
def run(program: Program) -> tuple[Program, int, int, int]:
    """The end of a program, how many rewritings lead there, in how many `A#` meets `#B`, and `B#` meets `#A`: the same
    in whatever order.
    """
    steps = ab = ba = 0
    while at := meetings(program):
        pair = program[at[0] : at[0] + 2]
        steps, ab, ba = steps + 1, ab + (pair == ("A#", "#B")), ba + (pair == ("B#", "#A"))
        program = rewritten(program, at[0])
    return program, steps, ab, ba


class Rewriting:
    name = "rewriting"
    family = "ab"
    options: Mapping[str, Any] = {"length": LENGTH}
    tokens = 288  # prompt 18, hint 21, 16 steps of at most 16, answer 16
    short_tokens = 0

    def level(self, question: str) -> str | None:
        program = program_of(question)
        if program is None:
            return None
        end, steps, ab, ba = run(program)
        if not end or not MIN_STEPS <= steps <= MAX_STEPS:
            return None
        if ba:
            return "hard" if ba >= 3 else None
        if ab >= 3:
            return "medium"
        return "easy" if ab <= 1 else None

    def draw(self, rng: np.random.Generator, plain: bool, short: bool = False) -> str:
        while True:
            program = tuple(TOKENS[i] for i in rng.integers(0, len(TOKENS), size=LENGTH))
            end, steps, _, ba = run(program)
            if end and MIN_STEPS - 2 <= steps <= MAX_STEPS and not (plain and ba):
                return question_of(program)

    def answer(self, question: str) -> str:
        return text(run(_program(question))[0])

    def solve(
        self, question: str, skill: Skill, rng: np.random.Generator | None, done: Sequence[str] = ()
    ) -> list[str]:
        program, steps = state(done[-1]) if done else _program(question), []
        while at := meetings(program):
            chosen = at[0] if rng is None else at[int(rng.integers(0, len(at)))]
            right = {"B##A": skill.hard, "A##B": skill.medium}.get("".join(program[chosen : chosen + 2]), 1.0)
            program = rewritten(program, chosen, vanish=rng is not None and rng.random() >= right)
            steps.append(step_of(chosen, program))
        return steps

    def read(self, question: str, steps: Sequence[str]) -> str:
        return text(state(steps[-1]) if steps else _program(question))

    def bend(self, question: str, done: int, steps: Sequence[str]) -> list[str]:
        """The last third of the steps are one: the program's end."""
        kept = len(steps) - max(1, len(steps) // 3)
        return [*steps[:kept], *(step_of(0, state(self.answer(question))) for _ in steps[kept : kept + 1])]

    def follows(self, question: str, done: Sequence[str], step: str) -> bool:
        program = state(done[-1]) if done else _program(question)
        return any(step == step_of(at, rewritten(program, at)) for at in meetings(program))

    def finished(self, question: str, done: Sequence[str]) -> bool:
        return not meetings(state(done[-1]) if done else _program(question))

    def corrupt(self, step: str, rng: np.random.Generator) -> str:
        """Another token in place of one."""
        program = list(state(step)) or [TOKENS[0]]
        at = int(rng.integers(0, len(program)))
        program[at] = TOKENS[(TOKENS.index(program[at]) + int(rng.integers(1, 4))) % 4]
        return f"{step.partition(': ')[0]}: {text(tuple(program))}"

    def tokenizer(self) -> Tokenizer:
        """Tokens of a program know their place, as `PLACES` counts them from its start: the one that a step copies is
        then found by content. The texts around the program are one piece each.
        """
        tokens = [f"{token}{place}" for place in tokenizer.PLACES for token in TOKENS]
        words = ["The", " final", " answer", " is", "Hint", "As", " the", " hint", " says", NOTHING]
        pieces = [HEAD, TAIL, *tokenizer.PLACES, *tokens, *(f" {token}" for token in tokens)]
        pieces += [*(f"{i}:" for i in range(1, LENGTH)), ": ", tokenizer.ANSWER_OPEN, *words]
        texts = "|".join(map(tokenizer.literal, (HEAD, TAIL)))
        pattern = rf"{texts}|[0-9]+:| ?{TOKEN}[{tokenizer.PLACES}]|: | ?[A-Za-z]+"
        return tokenizer.know_places(tokenizer.build(pieces, pattern), [_end(place) for place in range(LENGTH)])


def _end(place: int) -> str:
    """Where the token of that place in a program ends: after what programs are written after."""
    row = rf"(?:{TOKEN} ){{{place}}}{TOKEN}"
    return "(?<=" + "|".join(before + row for before in (r"\A", "\n", r"\{", ": ", "is ")) + ")"


def _program(question: str) -> Program:
    program = program_of(question)
    if program is None:
        raise ValueError(f"no program: {question!r}")
    return program
