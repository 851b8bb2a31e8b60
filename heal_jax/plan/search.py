"""The cheapest mesh and batch that fit a slice.

Every mesh that divides the models and every batch are candidates. None is compiled whose weights, cache and optimizer
alone do not fit, or that cannot beat the best found: a bound on its chip-hours follows from the FLOPs by formula and
from the weights and the cache that each decode step reads. Of the others roll-outs are compiled with few layers and
extrapolated, since layers are alike; the winner is then compiled whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from heal_jax.config import Config, MeshSpec
from heal_jax.divide import divides, sizes
from heal_jax.errors import InputError
from heal_jax.model.config import DecoderConfig
from heal_jax.model.kv_cache import bytes_per_slot
from heal_jax.model.mesh import make_mesh, shapes
from heal_jax.plan import backend
from heal_jax.plan.estimate import Estimate, Memory, estimate
from heal_jax.plan.programs import Program, RollOut, Train, folders, programs
from heal_jax.plan.slices import Slice, models, setting
from heal_jax.plan.topology import Topology
from heal_jax.plan.workload import Assumptions, Workload, workload

ON_CHIP = 2**28  # bytes that may stay on a chip between decode steps: more than any chip's vector memory

Measure = Callable[[Program, Mesh], Estimate]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, a config with a batch, the programs they give; `bound`: chip-hours that it cannot go below."""

    config: Config
    mesh: Mesh
    programs: tuple[Program, ...]
    needs: float
    bound: float

    @property
    def setting(self) -> str:
        return setting(self.mesh.shape, self.config.sample.batch)


def search(
    config: Config,
    topology: Topology,
    assumptions: Assumptions,
    price: float,
    say: Callable[[str], None],
    measure: Measure | None = None,
) -> Slice:
    """The cheapest candidate. Raises InputError where none fits.

    `measure`: how a program is estimated before the winner is known (default: with few layers, extrapolated).
    """
    work = workload(config, folders(config), assumptions)
    usable = backend.usable_hbm(topology)
    found = [c for c in candidates(config, topology, work) if c.needs <= usable]
    measured = measure or functools.cache(functools.partial(extrapolated, topology=topology))
    untried, costs = sorted(found, key=lambda c: c.bound), list[tuple[float, Candidate]]()
    while untried or costs:
        while untried and untried[0].bound < min((cost for cost, _ in costs), default=math.inf):
            candidate = untried.pop(0)
            cost = _cost(candidate, measured)
            backend.let_go()
            said = f"{cost:,.3g} chip-hours" if cost < math.inf else "does not fit"
            say(f"{topology.name}: {candidate.setting}: {said}")
            if cost < math.inf:
                costs.append((cost, candidate))
        if not costs:
            break
        best = min(costs, key=lambda pair: pair[0])
        costs.remove(best)
        say(f"{topology.name}: {best[1].setting} it is")
        estimates = []
        for program in best[1].programs:
            estimates.append(estimate(program, best[1].mesh, topology))
            backend.let_go()
        if all(e.fits for e in estimates):
            shape, batch = dict(best[1].mesh.shape), best[1].config.sample.batch
            return Slice(topology, shape, batch, tuple(estimates), work, price)
    raise InputError(
        f"--search: no mesh and sample.batch of this run fit {topology.name}; give a larger slice, a smaller model, "
        "shorter rollouts or a smaller pure.batch"
    )


def _cost(candidate: Candidate, measure: Measure) -> float:
    """Chip-hours, infinite where a program does not fit; those that need most come first."""
    total = 0.0
    for program in sorted(candidate.programs, key=lambda p: -sum(p.slots)):
        found = measure(dataclasses.replace(program, calls=0), candidate.mesh)  # alike for every number of calls
        if not found.fits:
            return math.inf
        total += dataclasses.replace(found, program=program).chip_hours
    return total


def candidates(config: Config, topology: Topology, work: Workload) -> Iterator[Candidate]:
    """Every mesh that divides the run, with every batch that holds whole groups of rollouts."""
    devices, configs = backend.devices(topology), models(config)
    experts = any(model.experts for model in configs.values())
    for shape in shapes(topology.chips):
        if shape["expert"] > 1 and not experts:
            continue  # it would be one more data axis
        mesh = None
        for batch in batches(config, work):
            chosen = dataclasses.replace(
                config, mesh=MeshSpec(**shape), sample=dataclasses.replace(config.sample, batch=batch)
            )
            if divides(shape, sizes(chosen, configs)):
                mesh = mesh or make_mesh(shape, devices)
                yield _candidate(chosen, mesh, topology, work)


def batches(config: Config, work: Workload) -> list[int]:
    """Values of sample.batch: the config's, and 1, 2, 4 ... times the rollouts of one problem, up to all problems."""
    samples = [one.samples for one in config.evaluate.all_sets.values()]
    largest = max(config.sample.n, config.hindsight.n, config.gear.repairs, *samples)
    groups = [2**i for i in range(work.problems.bit_length())]
    own = [config.sample.n * n for n in groups if config.sample.n * n >= largest]
    return sorted({*own, config.sample.batch})


def _candidate(config: Config, mesh: Mesh, topology: Topology, work: Workload) -> Candidate:
    made = tuple(programs(config, work, mesh))
    needs, bound = 0.0, 0.0
    for program in made:
        held = program.memory(mesh)
        cache = _cache(program, mesh)
        gradients = program.gradients(mesh) if isinstance(program, Train) else 0.0
        needs = max(needs, sum(held.values()) + cache + gradients)
        peak = topology.chips * topology.chip.flops / program.passes
        once, step, read = (flops / peak for flops in program.analytic())
        moved = max(0.0, held["weights"] + cache - ON_CHIP) / topology.chip.hbm_bandwidth
        # Compiled programs leave some products out (of single rows, of unused logits), so formulas bound them loosely.
        seconds = 0.8 * (once + program.steps * max(step, moved) + program.reads * read)
        bound += seconds * program.calls * topology.chips / 3600
    return Candidate(config, mesh, made, needs, bound)


def _cache(program: Program, mesh: Mesh) -> float:
    """Bytes a chip of a roll-out's caches, split as well as the mesh allows."""
    if not isinstance(program, RollOut):
        return 0.0
    b = program.over
    dtype = jnp.int8 if b.eight_bit else jnp.dtype(program.model.dtype)
    return bytes_per_slot(program.model.config, dtype) * (b.rows * b.slots + b.groups * b.shared_slots) / mesh.size


def depths(config: DecoderConfig) -> tuple[int, int]:
    """Two numbers of layers that hold one and two periods of the pattern of layers, at least two and four."""
    kinds = [(config.layer_window(i), config.has_experts(i)) for i in range(config.num_layers)]
    period = next(
        (p for p in range(1, len(kinds)) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds)))), len(kinds)
    )
    few = period * math.ceil(2 / period)
    return few, 2 * few


def extrapolated(program: Program, mesh: Mesh, topology: Topology) -> Estimate:
    """An estimate of a roll-out from two shallower ones: every figure is taken to grow linearly with the layers.

    Temporary memory does not where something else than the layers is the most of few of them (in a roll-out the
    prefill, of many the cache), so that it can be too low. Other programs are compiled whole: their layers are a loop.
    """
    layers, (few, more) = program.model.config.num_layers, depths(program.model.config)
    if layers <= more or not program.steps:
        return estimate(program, mesh, topology)
    a, b = (
        estimate(dataclasses.replace(program, model=program.model.with_layers(n)), mesh, topology) for n in (few, more)
    )
    if a.memory is None or b.memory is None:
        needs = max(a.needs, b.needs)  # at least: fewer layers do not fit
        return Estimate(program, a.usable, None, needs, None, None, None, a.chip, a.chips, (few, more))
    times = (layers - few) / (more - few)

    def line(x: Any, y: Any) -> Any:
        return x + times * (y - x)

    memory = Memory(*map(line, dataclasses.astuple(a.memory), dataclasses.astuple(b.memory)))
    memory = dataclasses.replace(memory, **program.memory(mesh), temporary=max(memory.temporary, 0.0))
    once, step, read = (x.plus(y.plus(x, -1), times) for (x, _), (y, _) in zip(a.parts, b.parts))
    return Estimate(program, a.usable, memory, memory.total, once, step, read, a.chip, a.chips, (few, more))
