"""Compile a run's programs for a slice; what each needs of a chip, and the least time it can take there.

Time is a roofline (Williams et al., 2009): the largest of FLOPs over peak, bytes over HBM bandwidth and collectives
over link bandwidth, as if each overlapped the others perfectly. A real run is slower; by how much only a run can tell.
"""

import dataclasses
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
    """One program on one slice. `once` is the work of a call outside the decode loop, `step` that of one decode step;
    None, as `memory`, where the compiler refused the program as too large: then it needs `needs` bytes a chip."""

    program: Program
    usable: float
    memory: Memory | None
    needs: float
    once: Cost | None
    step: Cost | None
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
        if self.once is None or self.step is None or not self.fits:
            return math.nan
        return self.roof(self.once).seconds + self.program.steps * self.roof(self.step).seconds

    @property
    def chip_hours(self) -> float:
        """Of all calls of the run; NaN where the program does not fit."""
        return self.seconds * self.program.calls * self.chips / 3600

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        if self.once is None or self.step is None:
            return []
        said = [
            f"{n:.0f} calls of {target} have FLOPs by formula"
            for target, n in self.once.plus(self.step).uncounted.items()
        ]
        total = self.once.plus(self.step, self.program.steps).flops * self.chips
        once, step = self.program.analytic()
        formula = once + self.program.steps * step
        if abs(total / formula - 1) > TOLERANCE:
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
        return Estimate(program, usable, None, needs, None, None, chip, topology.chips, _layers(program))
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
    if program.steps and not parsed.has_decode_loop:
        raise ValueError(f"no loop that carries a cache of {program.slots} slots")
    # Not peak_memory_in_bytes, which counts on-chip memory in.
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    held += used.temp_size_in_bytes + used.generated_code_size_in_bytes
    memory = Memory(**parts, cache=cache, temporary=held - parts["weights"] - parts["optimizer"] - cache)
    once = parsed.cost(0)
    step = parsed.cost(1).plus(once, -1)
    # Where kernels hide their FLOPs, or a loop its count, the formula's are the least there can be.
    once, step = (
        dataclasses.replace(cost, flops=max(cost.flops, by_formula / topology.chips))
        if any(cost.uncounted.values())
        else cost
        for cost, by_formula in zip((once, step), program.analytic())
    )
    return Estimate(program, usable, memory, memory.total, once, step, topology.chip, topology.chips, _layers(program))


def _layers(program: Program) -> tuple[int, ...]:
    return (program.model.config.num_layers,)
