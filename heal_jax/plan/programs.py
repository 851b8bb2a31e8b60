"""The programs of a run, as `heal run` compiles them, with nothing allocated: the same functions, the same shapes.

Three functions do all but a little of the run's work on the chips: `roll_out` (sample, hindsight, repair, evaluate),
`score` (PURE) and `train_step` (one program for the three stages of both students, whose rows are equally long).
Finding steps and breakpoints, which reads the sampled ids once, is left out.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from heal_jax.config import DEV, Config, ModelSpec, SampleSpec, TrainSpec
from heal_jax.errors import InputError
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.decoder import Model, abstract
from heal_jax.model.kernels import takes_splash
from heal_jax.model.lm import resolve
from heal_jax.model.lora import adapted, count, split
from heal_jax.model.mesh import batch_parts, parts_of, sharding, using
from heal_jax.model.weights import shardings
from heal_jax.plan import backend, flops
from heal_jax.plan.workload import Workload
from heal_jax.rollout.decode import READS, STEPS, TURNS, roll_out
from heal_jax.rollout.generate import Group, batch_arrays, dealt, score_batch
from heal_jax.rollout.sampling import Rule, rules
from heal_jax.rollout.score import score
from heal_jax.sets import draw_of, draws, place, widest
from heal_jax.shapes import (
    ScoreShape,
    Shape,
    bucket,
    evaluate_shape,
    hindsight_shape,
    positions,
    repair_shape,
    sample_shape,
    score_shape,
    train_rows,
)
from heal_jax.train.data import Batch
from heal_jax.train.loop import abstract_state, optimizer
from heal_jax.train.step import train_step


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model of which only the sizes matter. `name`: teacher or student."""

    name: str
    config: DecoderConfig
    dtype: str

    @functools.cache  # noqa: B019 (few, and small)
    def on(self, mesh: Mesh) -> Model:
        """Abstract parameters, placed as `load` places them."""
        graph, shapes = abstract(self.config, jnp.dtype(self.dtype))
        places = shardings(Model(graph, shapes, self.config), mesh)
        params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
        return Model(graph, params, self.config)

    def with_layers(self, layers: int) -> "Weights":
        """The same with the first `layers` layers alone."""
        c = self.config
        dense = tuple(layer for layer in c.dense_layers if layer < layers)
        fewer = dataclasses.replace(c, num_layers=layers, sliding=c.sliding[:layers], dense_layers=dense)
        return dataclasses.replace(self, config=fewer)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of the run. stages: that call it; model: whose weights it works with; resident: models whose
    weights are in memory besides; steps: decode steps a call (0: no decode loop); reads: of contexts that a call makes
    in each part of the mesh, one at a time (0: no loop that reads).
    """

    stages: tuple[str, ...]
    model: Weights
    resident: tuple[Weights, ...]
    calls: int
    steps: int = 0
    reads: int = 0

    @property
    def slots(self) -> tuple[int, ...]:
        """Of the caches that its decode loop carries."""
        return ()

    @property
    def loops(self) -> set[str]:
        """Names of those that data end."""
        return set()

    @property
    def name(self) -> str:
        return ", ".join(self.stages)

    @property
    def shape(self) -> str:
        """In words."""
        raise NotImplementedError

    def lower(self, mesh: Mesh) -> Any:
        """As `heal run` would call it, for this mesh."""
        raise NotImplementedError

    def analytic(self) -> tuple[float, float, float]:
        """FLOPs of matrix products by formula, all chips together: once a call, each decode step, each read."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """Of a TPU's matrix unit, which multiplies bfloat16, through each product."""
        return 6 if self.model.dtype == "float32" else 1

    def fused(self, tokens: int) -> bool:
        """Whether rows of so many tokens attend to themselves in a kernel."""
        return backend.has_libtpu() and takes_splash(jnp.dtype(self.model.dtype), tokens)

    def memory(self, mesh: Mesh) -> dict[str, float]:
        """Bytes a chip of the weights, the optimizer's state, and other models' weights."""
        resident = sum(per_chip(model.on(mesh).params) for model in self.resident)
        return {"weights": per_chip(self.model.on(mesh).params), "optimizer": 0.0, "resident": resident}


@dataclasses.dataclass(frozen=True)
class RollOut(Program):
    """parts: of the mesh, over which a batch is split."""

    batch: Shape = dataclasses.field(kw_only=True)
    drawn: tuple[Rule, ...] = dataclasses.field(kw_only=True)
    parts: int = dataclasses.field(kw_only=True)

    @property
    def over(self) -> Shape:
        """The batch as the mesh takes it."""
        return dealt(self.batch, self.parts)[0]

    @property
    def slots(self) -> tuple[int, ...]:
        return self.batch.slots, self.batch.shared_slots

    @property
    def loops(self) -> set[str]:
        return {STEPS} if self.over.at_once else {STEPS, READS, TURNS}

    @property
    def shape(self) -> str:
        b = self.over
        rows = "" if b.at_once else f" by {b.groups} x {b.members} rows"
        return f"{b.contexts} x {b.repeats} rollouts{rows}, {b.context_length} + {b.max_new} tokens"

    def lower(self, mesh: Mesh) -> Any:
        model, over = self.model.on(mesh), self.over
        arrays = _placed(mesh, batch_arrays([Group((0,), (), 1)], self.batch, self.parts), "context")
        eos = _placed(mesh, jax.ShapeDtypeStruct((1,), jnp.int32), None)
        with using(mesh):
            return roll_out.lower(
                model.graph,
                model.params,
                *arrays,
                eos,
                rules=self.drawn,
                **over.static,
            )

    def analytic(self) -> tuple[float, float, float]:
        b, config = self.over, self.model.config
        context = flops.blocks(config, b.context_length, b.context_length, self.fused(b.context_length))
        step = b.rows * (flops.blocks(config, 1, sum(self.slots)) + flops.head(config))
        return (b.contexts * context, step, 0.0) if b.at_once else (0.0, step, _split(b, self.parts) * context)


def _split(over: Shape, parts: int) -> int:
    """Into how many parts the contexts of a batch are split."""
    return parts_of(parts, over.contexts, over.groups)


@dataclasses.dataclass(frozen=True)
class Score(Program):
    batch: ScoreShape = dataclasses.field(kw_only=True)

    @property
    def shape(self) -> str:
        b = self.batch
        return f"{b.rows} rows of {b.length} tokens after {b.contexts} contexts of {b.context_length}"

    def lower(self, mesh: Mesh) -> Any:
        model, b = self.model.on(mesh), self.batch

        def whole(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        contexts = _placed(mesh, (whole(b.contexts, b.context_length), whole(b.contexts)), "context")
        rows = _placed(mesh, (whole(b.rows), whole(b.rows, b.length)))
        with using(mesh):
            return score.lower(model.graph, model.params, *contexts, *rows)

    def analytic(self) -> tuple[float, float, float]:
        b, config = self.batch, self.model.config
        contexts = b.contexts * flops.keys_and_values(config, b.context_length, self.fused(b.context_length))
        row = flops.blocks(config, b.length, b.context_length + b.length) + b.length * flops.head(config)
        return contexts + b.rows * row, 0.0, 0.0


@dataclasses.dataclass(frozen=True)
class Train(Program):
    rows: int = dataclasses.field(kw_only=True)
    width: int = dataclasses.field(kw_only=True)
    spec: TrainSpec = dataclasses.field(kw_only=True)

    @property
    def shape(self) -> str:
        return f"{self.rows} rows, {self.width} tokens; every stage of HEAL and of the baseline"

    def _model(self, mesh: Mesh) -> Model:
        return adapted(self.model.on(mesh), self.spec.lora, mesh, None)

    def _state(self, mesh: Mesh) -> dict[str, Any]:
        return abstract_state(self._model(mesh), optimizer(self.spec, self.spec.steps), mesh)

    def lower(self, mesh: Mesh) -> Any:
        model, state = self._model(mesh), self._state(mesh)
        transform = optimizer(self.spec, self.spec.steps)
        kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
        batch = Batch(*_placed(mesh, [jax.ShapeDtypeStruct((self.rows, self.width), kind) for kind in kinds]))
        pinned = tuple(leaf.sharding for leaf in jax.tree.leaves((state["params"], state["opt_state"])))
        dtype = jnp.dtype(self.model.dtype)
        arguments = model.graph, transform, state["params"], state["opt_state"], batch
        with using(mesh):
            frozen = split(model.params)[1]
            return train_step.lower(*arguments, dtype, pinned, self.spec.remat, self.spec.accumulate, frozen)

    def analytic(self) -> tuple[float, float, float]:
        fused, adapters = self.fused(self.width), count(self.model.config, self.spec.lora)
        a_row = flops.training(self.model.config, self.width, self.spec.remat, fused, adapters)
        return self.rows * a_row, 0.0, 0.0

    def memory(self, mesh: Mesh) -> dict[str, float]:
        state, frozen = self._state(mesh), split(self._model(mesh).params)[1]
        weights, moments = per_chip((state["params"], frozen)), per_chip(state["opt_state"])
        return {**super().memory(mesh), "weights": weights, "optimizer": moments}

    def gradients(self, mesh: Mesh) -> float:
        """Bytes a chip of the gradients, which are of the type that the model computes in."""
        return per_chip(self._state(mesh)["params"]) * jnp.dtype(self.model.dtype).itemsize / 4


def per_chip(tree: Any) -> float:
    """Bytes that one chip holds of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _placed(mesh: Mesh, tree: Any, axis: str | None = "batch") -> Any:
    """Abstract arrays, placed as `put_batch` places real ones."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        where = sharding(mesh, (axis,) + (None,) * (x.ndim - 1), x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def folders(config: Config) -> dict[str, Path]:
    """The model folders, of which planning needs config.json alone. Raises InputError where there is none."""
    return {"teacher": resolve(config.teacher), "student": resolve(config.student)}


def programs(config: Config, work: Workload, mesh: Mesh) -> list[Program]:
    """Every program of the run, equal ones once, in the order of the stages. Raises InputError where contexts and new
    tokens are more than a model has positions for.
    """

    def weights(name: str, spec: ModelSpec) -> Weights:
        return Weights(name, decoder_config(folders(config)[name]), spec.dtype)

    teacher, student = weights("teacher", config.teacher), weights("student", config.student)
    asked = [(teacher, work.shown + work.hint, config.sample.max_new_tokens, "sample")]
    for name, held_out in work.sets.items():
        draw = draw_of(config, name)
        where = place(name) if config.evaluate.all_sets[name].max_new_tokens else "sample"
        asked += [(m, held_out.prompts[m.name], draw.max_new_tokens, where) for m in (teacher, student)]
    for model, context, most, where in asked:
        if (need := positions(context, most)) > model.config.max_positions:
            raise InputError(
                f"{need} positions are needed ({where}.max_new_tokens and what comes before), the {model.name} has "
                f"{model.config.max_positions}; lower {where}.max_new_tokens"
            )
    found: list[Program] = []
    for program in _all(config, work, mesh, teacher, student):
        same = [i for i, other in enumerate(found) if _same(program, other)]
        if same:
            other = found[same[0]]
            stages, resident = other.stages + program.stages, other.resident or program.resident
            calls = other.calls + program.calls
            found[same[0]] = dataclasses.replace(other, stages=stages, calls=calls, resident=resident)
        else:
            found.append(program)
    return found


def _same(a: Program, b: Program) -> bool:
    """Whether two calls run the same compiled program."""

    def key(program: Program) -> Program:
        model = dataclasses.replace(program.model, name="")
        return dataclasses.replace(program, stages=(), resident=(), calls=0, model=model)

    return type(a) is type(b) and key(a) == key(b)


def _all(config: Config, work: Workload, mesh: Mesh, teacher: Weights, student: Weights) -> Iterator[Program]:
    def filled(shape: Shape, units: float) -> int:
        """Contexts of a call: those of a shape for all problems may be more than there turn out to be."""
        return math.ceil(units / math.ceil(units / shape.contexts)) if units else 0

    def rolled(
        stage: str,
        model: Weights,
        shape: Shape,
        units: float,
        *resident: Weights,
        calls: int = 1,
        spec: SampleSpec = config.sample,
    ) -> Iterator[RollOut]:
        """Every leg of the rollouts' tokens; each rollout has work.decode_steps, or as many as it may."""
        batches, parts = calls * math.ceil(units / shape.contexts), batch_parts(mesh)
        for leg in shape.legs():
            over, there = dealt(leg, parts)[0], filled(shape, units) * shape.repeats // leg.repeats
            tokens = min(work.decode_steps - leg.done, leg.max_new)
            if tokens <= 0:  # no rollout is so long
                return
            steps = tokens * (1 if over.at_once else math.ceil(there * over.repeats / over.rows))
            reads = 0 if over.at_once else math.ceil(there / _split(over, parts))
            name = f"{stage} beyond {leg.done}" if leg.done else stage
            loops = batches, steps, reads
            yield RollOut((name,), model, resident, *loops, batch=leg, drawn=rules(spec), parts=parts)

    def scored(stage: str, shape: Shape, units: float, context: int) -> Score:
        """Every rollout of a stage, call by call: at most so many, since only the correct are scored."""
        batch = score_batch(score_shape(config, context), batch_parts(mesh))
        each = math.ceil(filled(shape, units) * shape.repeats / batch.rows)
        return Score((f"score {stage}",), teacher, (), math.ceil(units / shape.contexts) * each, batch=batch)

    hard, paths = work.problems * work.hard, work.problems * work.unsolved * config.gear.paths
    n, longest = work.problems, work.prompt + work.kept
    yield from rolled("sample", teacher, sample_shape(config, n, work.prompt), n)
    hindsight, repair = hindsight_shape(config, n, work.shown), repair_shape(config, n, longest + work.hint)
    yield from rolled("hindsight", teacher, hindsight, hard)
    yield scored("hindsight", hindsight, hard, work.prompt)
    yield from rolled("repair", teacher, repair, paths)
    yield scored("repair", repair, paths, longest)
    width = max(config.train.row_tokens, bucket(config.train.max_tokens))
    updates = 2 * config.train.steps  # HEAL and the baseline
    before = () if config.train.lora.rank else (student,)  # LoRA's frozen weights are those of the student as it was
    rows = train_rows(config.train, batch_parts(mesh))
    yield Train(("train",), student, before, updates, rows=rows, width=width, spec=config.train)
    # Other models' weights that are in memory then: the student as it was, from before its training on.
    prompts = {m.name: {name: one.prompts[m.name] for name, one in work.sets.items()} for m in (teacher, student)}
    for draw in draws(config, dev=True):
        count = work.sets[draw.set].problems
        spec = dataclasses.replace(config.sample, temperature=draw.temperature)
        # Students are put to the dev problems after each of three stages, both of them.
        for model, calls in ((student, 6),) if draw.set == DEV else ((teacher, 1), (student, 3)):
            shape = evaluate_shape(config, draw, count, widest(config, draw, prompts[model.name]))
            yield from rolled(draw.stage(model.name), model, shape, count, student, calls=calls, spec=spec)
