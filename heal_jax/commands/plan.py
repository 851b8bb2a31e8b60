"""heal plan."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated

import tyro

from heal_jax.commands.arguments import Said, check_json, configured
from heal_jax.config import Config, validate
from heal_jax.errors import InputError
from heal_jax.plan.assumptions import Assumptions, check
from heal_jax.plan.backend import environment
from heal_jax.plan.topology import Topology
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Compile every program of a run for slices of TPUs, without a TPU: memory, FLOPs, bytes, collectives, least time,
    chip-hours. Models need their config.json alone."""

    config: tyro.conf.Positional[Path]
    """A YAML file; fields that it leaves out have the defaults below."""
    topology: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHIP:SHAPE"), tyro.conf.UseAppendAction]
    """A slice, such as v5e:4x8, v5p:2x2x2 or v6e:4x4."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    assumptions: Annotated[Assumptions, tyro.conf.arg(name="")] = Assumptions()
    search: bool = False
    """Try meshes and values of sample.batch, and plan the cheapest that fits."""
    price_per_chip_hour: float = 0.0
    """For the cost of the whole run."""
    json: Path | None = None
    """Write all figures to this file, too."""
    said: Annotated[Said, tyro.conf.arg(name="")] = Said()


def main(command: str, argv: list[str], progress: Progress) -> int:
    description = "whether a run fits on TPUs, and what it costs; needs no TPU"
    arguments = configured(PlanArguments, command, "--topology v5e:4x8", argv, description, topology=())
    validate(arguments.settings)
    check(arguments.assumptions, arguments.settings.sample.max_new_tokens)
    if not arguments.topology:
        raise InputError("plan: name a slice, such as --topology v5e:4x8")
    price, file = arguments.price_per_chip_hour, arguments.json
    if not 0 <= price < math.inf:
        raise InputError(f"--price-per-chip-hour: {price} is out of range, allowed: >= 0")
    check_json(file)
    topologies = [Topology(name) for name in arguments.topology]
    os.environ.update(environment(topologies))  # before jax, which reads it
    from heal_jax.plan.search import search
    from heal_jax.plan.show import show
    from heal_jax.plan.slices import plan_slice, prepare, to_json
    from heal_jax.store import write_json

    done = []
    for topology in topologies if not arguments.search else ():
        prepare(arguments.settings, topology, arguments.assumptions)  # what is wrong is said before any compiling
    for topology in topologies:
        with progress.stage(f"plan {topology.name}"):
            work = arguments.settings, topology, arguments.assumptions, price
            done.append(search(*work, progress.say) if arguments.search else plan_slice(*work, progress))
        progress.close()
        show(done[-1], progress.printer)
        progress.log("result", **to_json(done[-1:])[0])
        if file is not None:
            write_json(file, to_json(done))
    return 0
