"""heal ablate."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from heal_jax.commands.arguments import Said, configured
from heal_jax.config import Config
from heal_jax.errors import InputError
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class AblateArguments:
    """What each part of HEAL is worth: students of all arms from the same rollouts, initial weights, optimizer steps
    and held-out problems, over several seeds. Writes ablation.json and report.html; run again, it goes on."""

    config: tyro.conf.Positional[Path]
    """A YAML file; fields that it leaves out have the defaults below."""
    out: Path
    """A folder on a disk; made where it is not there, gone on with where it is."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """How many seeds, from the config's on: each has rollouts, students and batches of its own."""
    arms: str = ""
    """Names with commas between, such as heal,no_pure; all by default. Rejection sampling is always there; none:
    no student."""
    measure: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also measure, on the first seed's rollouts, what repairs from every cut come to (in a built-in world), and how
    PURE tells planted shortcuts."""
    jobs: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Arms at a time, each with its share of the processors; for CPUs. Small models keep little more than one busy."""
    said: Annotated[Said, tyro.conf.arg(name="")] = Said()


def main(command: str, argv: list[str], progress: Progress) -> int:
    a: AblateArguments = configured(AblateArguments, command, "--out DIR", argv, "", out=tyro.MISSING)
    if a.seeds < 1:
        raise InputError(f"--seeds: {a.seeds} is out of range, allowed: >= 1")
    if a.jobs < 1:
        raise InputError(f"--jobs: {a.jobs} is out of range, allowed: >= 1")
    from heal_jax.ablate.arms import chosen

    arms = chosen([name for name in a.arms.split(",") if name])
    from heal_jax import cache, processes
    from heal_jax.ablate.page import in_terminal
    from heal_jax.ablate.run import ablate

    with processes.job():
        if not processes.primary():
            progress.mute()
        cache.enable(progress.say)
        found = ablate(a.settings, arms, a.seeds, a.out, progress, a.measure, a.jobs)
        if processes.primary():
            progress.close()
            progress.printer.print(in_terminal(found, progress.printer.width))
            progress.printer.print(f"report: {a.out / 'report.html'}", markup=False, soft_wrap=True)
            progress.log("result", ablation=found)
    return 0
