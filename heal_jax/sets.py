"""The evaluation sets of a run: their problems, and what each model is asked for of them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from heal_jax.config import DEV, GREEDY, MAIN, Config, EvaluateSet
from heal_jax.errors import InputError
from heal_jax.problems.sources import Problem, load


@dataclasses.dataclass(frozen=True)
class Draw:
    """Samples of every problem of a set: how many of each, at what temperature, of how many new tokens at most."""

    set: str
    samples: int
    temperature: float
    max_new_tokens: int
    greedy: bool = False
    """Whether it is the greedy one beside the set's samples."""

    @property
    def folder(self) -> str:
        """Of its shards, in the run directory."""
        return "/".join(["evaluation", *[self.set] * bool(self.set), *[GREEDY] * self.greedy])

    def stage(self, model: str) -> str:
        """That a model draws it, in words."""
        return f"evaluate {model}" + f" on {self.set}" * bool(self.set) + f", {GREEDY}" * self.greedy


def place(name: str) -> str:
    """Where a set stands in the config."""
    return {MAIN: "evaluate", DEV: "evaluate.dev"}.get(name, f"evaluate.sets.{name}")


def draw_of(config: Config, name: str) -> Draw:
    """The samples of a set."""
    one: EvaluateSet = config.evaluate.all_sets[name]
    return Draw(name, one.samples, one.temperature, one.max_new_tokens or config.sample.max_new_tokens)


def draws(config: Config, dev: bool = False) -> list[Draw]:
    """All that the evaluation stage asks each model for, of the main set first; with what students are chosen by where
    `dev`.
    """
    found = []
    for name, one in config.evaluate.all_sets.items():
        if dev or name != DEV:
            draw = draw_of(config, name)
            best = dataclasses.replace(draw, samples=1, temperature=0.0, greedy=True)
            found += [draw, *[best] * one.greedy]
    return found


def widest(config: Config, draw: Draw, longest: Mapping[str, int]) -> int:
    """Tokens that a draw's prompts get, at least; `longest`: of the prompts of each set, by its name.

    Further sets that differ in nothing else that is compiled get as much, so that sets of as many problems share a
    program; the main set's figures do not hang on which others there are.
    """
    alike = [other.set for other in draws(config) if dataclasses.replace(other, set=draw.set) == draw]
    return max(longest[name] for name in ([draw.set] if draw.set in (MAIN, DEV) else alike))


def load_set(config: Config, name: str) -> list[Problem]:
    """The problems of one set. Raises InputError where they cannot be loaded."""
    one: EvaluateSet = config.evaluate.all_sets[name]
    by, field = (config.grade.by, "grade.by") if one.by == "run" else (one.by, f"{place(name)}.by")
    try:
        return load(one.problems, by, f"{place(name)}.problems")
    except InputError as error:
        raise InputError(re.sub(r"^grade\.by\b", field, str(error))) from None


def load_sets(config: Config) -> dict[str, list[Problem]]:
    """The problems of every set, by its name. Raises InputError where one cannot be loaded, and where a dev problem is
    in another set: what is chosen by must not be what is reported.
    """
    found = {name: load_set(config, name) for name in config.evaluate.all_sets}
    chosen_by = {" ".join(p.question.split()) for p in found.get(DEV, [])}
    for name, several in found.items():
        shared = [p for p in several if name != DEV and " ".join(p.question.split()) in chosen_by]
        if shared:
            raise InputError(
                f"evaluate.dev: {len(shared)} of its problems are in {place(name)} too, the first is {shared[0].id}; "
                "take another split, seed or file for one of the two"
            )
    return found


def further(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Title and figures of all that was asked besides the main set's samples, from a run's summary."""
    found = []
    for name, figures in {MAIN: summary, **summary.get("sets", {})}.items():
        if name != MAIN:
            found.append((name, figures))
        if GREEDY in figures:
            found.append((", ".join(filter(None, (name, GREEDY))), figures[GREEDY]))
    return found
