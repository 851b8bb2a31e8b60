"""heal bench."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from heal_jax.commands.arguments import Said, check_json, parse
from heal_jax.config import load
from heal_jax.errors import InputError
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Measure speed: both sides in one run, in turns, beside the machine's own limits. Tools that are not installed are
    left out."""

    part: tyro.conf.Positional[Literal["decode", "round", "pure", "train", "all", "faults", "fuzz"]]
    """What to measure; all is all of speed. faults: runs of a config are killed at random moments, go on with the same
    command, and are compared with an undisturbed one. fuzz: broken and hostile configs, problem files, model folders
    and run directories are read, or refused in one line; needs hypothesis: pip install 'heal-jax[fuzz]'."""
    model: str = "builtin:teacher"
    """A model folder (the README's figures: that of `heal fetch-model smollm2`), in float32."""
    json: Path | None = None
    """Write every repeat to this file, too."""
    quick: bool = False
    """Smallest sizes: shows that it works, measures nothing."""
    markdown: bool = False
    """Print the table as Markdown, as the README has it."""
    tunix_python: str | None = None
    """The python of an environment with google-tunix; by default the one that HEAL_TUNIX_PYTHON names."""
    config: Path = Path("configs/tiny.yaml")
    """For faults and fuzz: what to run; fuzz damages copies of that run."""
    kills: Annotated[int, tyro.conf.arg(metavar="N")] = 30
    """For faults: how many times; each stage is hit as often as any other, start-up too."""
    cases: Annotated[int, tyro.conf.arg(metavar="N")] = 5000
    """For fuzz: how many cases over all kinds."""
    seed: int = 0
    """For fuzz: which cases; the same seed and number give the same ones."""
    said: Annotated[Said, tyro.conf.arg(name="")] = Said()


def main(command: str, argv: list[str], progress: Progress) -> int:
    a: BenchArguments = parse(BenchArguments, command, argv)
    check_json(a.json)
    if a.part == "faults":
        if a.kills < 1:
            raise InputError(f"--kills: {a.kills} is out of range, allowed: >= 1")
        from heal_jax.bench import faults

        faults.run(a.config, a.kills, progress, a.json)
    elif a.part == "fuzz":
        if a.cases < 1:
            raise InputError(f"--cases: {a.cases} is out of range, allowed: >= 1")
        from heal_jax.bench.fuzz.command import run as fuzz

        load(a.config)
        fuzz(a.cases, a.seed, a.config, progress, a.json)
    else:
        from heal_jax.bench.run import run as bench

        bench(
            a.part,
            a.model,
            progress,
            file=a.json,
            quick=a.quick,
            tunix_python=a.tunix_python,
            table=a.markdown,
        )
    return 0
