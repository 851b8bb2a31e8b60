"""heal doctor."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from heal_jax.commands.arguments import configured
from heal_jax.config import Config, validate
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class DoctorArguments:
    """Look at this machine: packages, devices, memory, disk, caches, processes; with a config, at its models, problems
    and lengths as well. Each finding is ok, a warning, or a problem with what to do about it; exit status 1 where there
    is a problem. Nothing is written."""

    config: tyro.conf.Positional[Path | None]
    """The YAML file of a run."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    out: Path = Path("runs")
    """The run directory that is planned, for its disk."""
    json: bool = False
    """Print the findings as one JSON object: findings [{topic, level, text, advice}], problems, warnings."""


def main(command: str, argv: list[str], progress: Progress) -> int:
    description = DoctorArguments.__doc__ or ""
    arguments = configured(DoctorArguments, command, "", argv, description, needed=False)
    validate(arguments.settings)
    from heal_jax.doctor import PROBLEM, WARNING, examine, show

    config = arguments.settings if arguments.config is not None else None
    found = list(examine(config, arguments.out))
    levels = [finding.level for finding in found]
    if arguments.json:
        findings = [dataclasses.asdict(finding) for finding in found]
        counts = {"problems": levels.count(PROBLEM), "warnings": levels.count(WARNING)}
        print(json.dumps({"findings": findings, **counts}, indent=2))
    else:
        show(found, progress.printer)
    return 1 if PROBLEM in levels else 0
