"""The plan of a run on one slice: every program compiled, the whole run added up."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from heal_jax.config import Config
from heal_jax.divide import require, sizes
from heal_jax.model.config import decoder_config
from heal_jax.model.mesh import describe, make_mesh
from heal_jax.plan import backend
from heal_jax.plan.cost import Cost
from heal_jax.plan.estimate import Estimate, estimate
from heal_jax.plan.programs import Program, folders, programs
from heal_jax.plan.topology import Topology
from heal_jax.plan.workload import Assumptions, Workload, workload
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Slice:
    """mesh: the size of every axis; batch: sample.batch; price: of a chip's hour, 0 where none is given."""

    topology: Topology
    mesh: dict[str, int]
    batch: int
    estimates: tuple[Estimate, ...]
    work: Workload
    price: float

    @property
    def fits(self) -> bool:
        return all(e.fits for e in self.estimates)

    @property
    def chip_hours(self) -> float:
        """NaN where a program does not fit."""
        return sum(e.chip_hours for e in self.estimates)

    @property
    def setting(self) -> str:
        return setting(self.mesh, self.batch)


def setting(shape: Mapping[str, int], batch: int) -> str:
    """What a search chooses, in words."""
    return f"mesh {describe(shape)}, sample.batch {batch}"


def models(config: Config) -> dict[str, Any]:
    """The decoders' configurations, by name. Raises InputError where a folder has no usable config.json."""
    return {name: decoder_config(folder) for name, folder in folders(config).items()}


def prepare(config: Config, topology: Topology, assumptions: Assumptions) -> tuple[Mesh, Workload, list[Program]]:
    """All but the compiling. Raises InputError for a mesh or lengths that do not go with the slice or the models."""
    mesh = make_mesh(dataclasses.asdict(config.mesh), backend.devices(topology))
    require(mesh.shape, sizes(config, models(config)))
    work = workload(config, folders(config), assumptions)
    return mesh, work, programs(config, work, mesh)


def plan_slice(
    config: Config,
    topology: Topology,
    assumptions: Assumptions,
    price: float,
    progress: Progress,
) -> Slice:
    """Compile every program of the run for the slice. Raises InputError as `prepare` does."""
    mesh, work, made = prepare(config, topology, assumptions)
    found, stage = [], f"plan {topology.name}"
    progress.update(stage, 0, len(made), "programs")
    for program in made:
        progress.say(f"{topology.name}: compiling {program.name} ({program.model.config.num_layers} layers)")
        found.append(estimate(program, mesh, topology))
        backend.let_go()
        fits = sum(e.fits for e in found)
        progress.update(stage, len(found), len(made), "programs", counts={"fit": fits})
    return Slice(topology, dict(mesh.shape), config.sample.batch, tuple(found), work, price)


def to_json(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """All figures as plain data: bytes, FLOPs and seconds a chip."""
    return [
        {
            "topology": s.topology.name,
            "chips": s.topology.chips,
            "compiler": "libtpu" if backend.has_libtpu() else "cpu",
            "mesh": s.mesh,
            "sample_batch": s.batch,
            "fits": s.fits,
            "assumed": list(s.work.assumed),
            "programs": [_program(e) for e in s.estimates],
            "chip_hours": s.chip_hours if s.fits else None,
            "cost": s.chip_hours * s.price if s.fits and s.price else None,
        }
        for s in slices
    ]


def _program(e: Estimate) -> dict[str, Any]:
    def cost(work: Cost | None) -> dict[str, Any] | None:
        if work is None:
            return None
        limit = e.roof(work)
        kinds = {k: {"count": n, "bytes": work.payload[k]} for k, n in work.collectives.items() if n}
        figures = {"flops": work.flops, "bytes": work.bytes, "link_bytes": work.wire, "collectives": kinds}
        return {**figures, "roofline_seconds": limit.seconds, "roof": limit.name}

    program: Program = e.program
    return {
        "stages": list(program.stages),
        "model": program.model.name,
        "shape": program.shape,
        "layers": program.model.config.num_layers,
        "layers_compiled": list(e.layers),
        "fits": e.fits,
        "bytes_needed": e.needs,
        "bytes_usable": e.usable,
        "memory": None if e.memory is None else dataclasses.asdict(e.memory),
        "once": cost(e.once),
        "step": cost(e.step) if program.steps else None,
        "steps": program.steps,
        "step_bytes_over_least": e.step_excess,
        "read": cost(e.read) if program.reads else None,
        "reads": program.reads,
        "calls": program.calls,
        "seconds_a_call": e.seconds if e.fits else None,
        "chip_hours": e.chip_hours if e.fits else None,
        "warnings": e.warnings,
    }
