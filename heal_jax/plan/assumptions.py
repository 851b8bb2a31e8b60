"""What is assumed of a run that has not been made: options of `heal plan`. Imports no jax."""

import dataclasses
import typing
from typing import Annotated

from heal_jax.errors import InputError
from heal_jax.strict import Range


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Lengths and counts that are not given are measured from problems and tokenizer; where those are not there, they
    are the defaults named here."""

    problems: Annotated[int | None, Range(ge=1)] = None
    """Training problems (default where they are not there: 1000)."""
    held_out: Annotated[int | None, Range(ge=1)] = None
    """Held-out problems (default where they are not there: 500)."""
    prompt_tokens: Annotated[int | None, Range(ge=1)] = None
    """Tokens of the longest prompt (512)."""
    hint_tokens: Annotated[int | None, Range(ge=1)] = None
    """Tokens of the longest hint (64)."""
    kept_tokens: Annotated[int | None, Range(ge=0)] = None
    """Tokens of the longest kept prefix: always assumed (gear.window of sample.max_new_tokens)."""
    decode_steps: Annotated[int | None, Range(ge=1)] = None
    """Decode steps that a rollout takes its row (sample.max_new_tokens)."""
    hard: Annotated[float, Range(ge=0.0, le=1.0)] = 0.5
    """Share of the problems that get hindsight."""
    unsolved: Annotated[float, Range(ge=0.0, le=1.0)] = 0.25
    """Share of the problems that are repaired."""


def check(assumptions: Assumptions, max_new_tokens: int) -> None:
    """Raises InputError for a value out of range, or larger than what it is part of."""
    hints = typing.get_type_hints(Assumptions, include_extras=True)
    for name, hint in hints.items():
        value, bound = getattr(assumptions, name), hint.__metadata__[0]
        if value is not None and not bound.holds(value):
            raise InputError(f"--{name.replace('_', '-')}: {value!r} is out of range, allowed: {bound}")
    a = assumptions
    if a.unsolved > a.hard:
        raise InputError(
            f"--unsolved {a.unsolved}: unsolved problems are among the hard, of which --hard gives {a.hard}"
        )
    for name, tokens in (("--decode-steps", a.decode_steps), ("--kept-tokens", a.kept_tokens)):
        if tokens is not None and tokens > max_new_tokens:
            raise InputError(f"{name} {tokens}: a rollout has at most sample.max_new_tokens {max_new_tokens}")
