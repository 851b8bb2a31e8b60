"""Compile a run's programs for a slice; what each needs of a chip, and the least time it can take there.

Time is a roofline (Williams et al., 2009): the largest of FLOPs over peak, bytes over HBM bandwidth and collectives
over link bandwidth, as if each overlapped the others perfectly. A real run is slower; by how much only a run can tell.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from heal_jax.errors import RunError
from heal_jax.plan import backend
from heal_jax.plan.cost import Compiled, Cost
from heal_jax.plan.programs import Program
from heal_jax.plan.topology import Chip, Topology

TOLERANCE = 0.1  # between FLOPs counted in the compiled program and by formula, before it is said


@dataclasses.dataclass(frozen=True)
class Roof:
    """Seconds, and which roof they are: compute, memory or links."""

    seconds: float
    name: str


def roof(cost: Cost, chip: Chip, passes: int = 1) -> Roof:
    """The least time of a chip for this work; `passes`: of its matrix unit through each product."""
    times = {
        "compute": passes * cost.flops / chip.flops,
        "memory": cost.bytes / chip.hbm_bandwidth,
        "links": cost.wire / chip.link,
    }
    name = max(times, key=lambda key: times[key])
    return Roof(times[name], name)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip: weights (of the program's model, float32 masters in training), optimizer, resident (other models'
    weights), cache, temporary (all else that XLA reports: results, scratch, code)."""

    weights: float
    optimizer: float
    resident: float
    cache: float
    temporary: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One program on one slice. `once` is the work of a call outside the loops, `step` that of one decode step, `read`
    that of reading one context in each part of the mesh, where a loop does; None, as `memory`, where the compiler
    refused the program as too large: then it needs `needs` bytes a chip."""

    program: Program
    usable: float
    memory: Memory | None
    needs: float
    once: Cost | None
    step: Cost | None
    read: Cost | None
    chip: Chip
    chips: int
    layers: tuple[int, ...]  # that were compiled: the model's, or fewer, from which the figures are extrapolated

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needs <= self.usable

    def roof(self, cost: Cost) -> Roof:
        """The least time of a chip for this part of the program."""
        return roof(cost, self.chip, self.program.passes)

    @property
    def seconds(self) -> float:
        """Of one call; NaN where the program does not fit."""
        if not self.parts or not self.fits:
            return math.nan
        return sum(times * self.roof(cost).seconds for cost, times in self.parts)

    @property
    def parts(self) -> list[tuple[Cost, int]]:
        """Work of a call, and how often it is done: once, each decode step, each read. Empty if it was refused."""
        if self.once is None or self.step is None or self.read is None:
            return []
        return [(self.once, 1), (self.step, self.program.steps), (self.read, self.program.reads)]

    @property
    def step_excess(self) -> float | None:
        """Bytes that a decode step moves over those it cannot do without: the weights and the caches, read once. None
        where there is no step; caches that stay on the chip can make it less than 1."""
        if self.memory is None or self.step is None or not self.program.steps:
            return None
        return self.step.bytes / (self.memory.weights + self.memory.cache)

    @property
    def chip_hours(self) -> float:
        """Of all calls of the run; NaN where the program does not fit."""
        return self.seconds * self.program.calls * self.chips / 3600

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        if not self.parts:
            return []
        every = functools.reduce(Cost.plus, (cost for cost, _ in self.parts))
        said = [f"{n:.0f} calls of {target} have FLOPs by formula" for target, n in every.uncounted.items()]
        total = sum(times * cost.flops for cost, times in self.parts) * self.chips
        formula = sum(times * flops for flops, (_, times) in zip(self.program.analytic(), self.parts))
        if formula and abs(total / formula - 1) > TOLERANCE:
            said.append(f"{total:.3g} FLOPs compiled over all chips, {formula:.3g} by formula ({total / formula:.2f}x)")
        return said


def estimate(program: Program, mesh: Mesh, topology: Topology) -> Estimate:
    """Compile and read. A program that does not fit is an estimate; raises RunError for any other refusal, and for a
    compiled program that cannot be read.
    """
    usable, chip = backend.usable_hbm(topology), topology.chip
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        found = backend.needed(error)
        if found is None:
            said = " ".join(str(error).split())[:300]
            raise RunError(
                f"{topology.name}, {program.name}: the compiler failed ({said}); if libtpu is not the version that jax "
                "asks for, pip install 'jax[tpu]'"
            ) from error
        needs = found[0] + program.memory(mesh)["resident"]
        return Estimate(program, usable, None, needs, None, None, None, chip, topology.chips, _layers(program))
    try:
        return read(program, compiled, mesh, usable, topology)
    except (ValueError, KeyError) as error:
        raise RunError(
            f"{topology.name}, {program.name}: the compiler wrote what heal plan cannot read ({error}); use the "
            "versions that pip install 'heal-jax[plan]' brings"
        ) from error


def read(program: Program, compiled: Any, mesh: Mesh, usable: float, topology: Topology) -> Estimate:
    """The figures of a compiled program."""
    parsed = Compiled(compiled.as_text(), program.slots)
    parts, cache, used = program.memory(mesh), parsed.cache, compiled.memory_analysis()
    if parsed.loops != program.loops or (program.loops and not parsed.caches):
        raise ValueError(f"loops {', '.join(sorted(parsed.loops)) or '(none)'} that carry {len(parsed.caches)} caches")
    # Not peak_memory_in_bytes, which counts on-chip memory in.
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    held += used.temp_size_in_bytes + used.generated_code_size_in_bytes
    memory = Memory(**parts, cache=cache, temporary=held - parts["weights"] - parts["optimizer"] - cache)
    once = parsed.cost()
    step, read = (parsed.cost(**{name: 1}).plus(once, -1) for name in ("steps", "reads"))
    # Where kernels hide their FLOPs, or a loop its count, the formula's are the least there can be.
    once, step, read = (
        dataclasses.replace(cost, flops=max(cost.flops, by_formula / topology.chips))
        if any(cost.uncounted.values())
        else cost
        for cost, by_formula in zip((once, step, read), program.analytic())
    )
    return Estimate(
        program, usable, memory, memory.total, once, step, read, topology.chip, topology.chips, _layers(program)
    )


def _layers(program: Program) -> tuple[int, ...]:
    return (program.model.config.num_layers,)
