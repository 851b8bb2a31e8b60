"""Training in phases, with checkpoints that any interruption goes on from to the same weights.

A phase is a stretch of optimizer steps on one list of examples. Optimizer state and learning rate run through all
phases. Which batch and which rate a step has follows from the global step alone, so weights, optimizer state and step
are the whole state.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from heal_jax import signals
from heal_jax.config import TrainSpec
from heal_jax.errors import RunError
from heal_jax.model.decoder import Model
from heal_jax.model.lora import adapted, split
from heal_jax.model.mesh import batch_parts, put_batch, using
from heal_jax.model.weights import shardings
from heal_jax.processes import once
from heal_jax.shapes import train_rows
from heal_jax.storage import place
from heal_jax.train.checkpoint import Progress, keep_whole, opened, require_room, restore
from heal_jax.train.data import Batch, Example, batches, filled_up, unpack
from heal_jax.train.meter import Meter
from heal_jax.train.step import train_step

FINAL_RATE = 0.1  # of the peak: the last stage, the repairs, comes at the end and must still be learned
B2 = 0.95  # remembers about 20 steps: short runs, and a new stage changes the size of the gradients


@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on `examples`. The name is for the log."""

    name: str
    examples: Sequence[Example]
    steps: int


def stage_steps(shares: tuple[float, float, float], total: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Split `total` optimizer steps between stages of these sizes (examples); the sum is exactly `total`.

    An empty stage's share goes to the others in proportion. Largest remainders, ties to the earlier stage.
    Raises RunError where no stage has both examples and a share.
    """
    weights = [Fraction(share) if size else Fraction(0) for share, size in zip(shares, sizes, strict=True)]
    if not sum(weights):
        raise RunError(
            f"there is nothing to train on: stages of {', '.join(map(str, sizes))} examples "
            f"with pace.steps {list(shares)}; sample more problems or loosen what drops the rollouts"
        )
    exact = [total * weight / sum(weights) for weight in weights]
    steps = [math.floor(x) for x in exact]
    for i in sorted(range(len(steps)), key=lambda i: steps[i] - exact[i])[: total - sum(steps)]:
        steps[i] += 1
    return steps[0], steps[1], steps[2]


def schedule(spec: TrainSpec, total_steps: int) -> optax.Schedule:
    """Learning rate by step, from 0: w warm-up steps from peak / w to the peak, then cosine to 10 % or constant."""
    warmup = max(1, round(spec.warmup * total_steps))
    final = FINAL_RATE if spec.schedule == "cosine" else 1.0
    peak = spec.learning_rate
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup - 1, total_steps, final * peak)


@functools.cache
def rates(spec: TrainSpec, total_steps: int) -> Callable[[int], jax.Array]:
    """`schedule`, compiled as one program."""
    return jax.jit(schedule(spec, total_steps))


@functools.cache
def optimizer(spec: TrainSpec, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm and AdamW; norm weights (vectors) do not decay.

    The same object for the same arguments: the optimizer is a static argument of the compiled step, so both students
    share one program.
    """
    return optax.chain(
        optax.clip_by_global_norm(spec.clip_norm),
        optax.adamw(
            schedule(spec, total_steps),
            b2=B2,
            weight_decay=spec.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


class Trained(NamedTuple):
    """The model, in the dtype that it had before, and what its training took; by step, the accuracies on dev problems,
    of which the model has the best (of equals the latest)."""

    model: Model
    progress: Progress
    dev: dict[int, float]


def train(
    model: Model,
    phases: Sequence[Phase],
    spec: TrainSpec,
    *,
    length: int,
    pad_id: int,
    seed: int,
    folder: Path,
    checkpoint_seconds: float,
    mesh: Mesh | None,
    log: Callable[[dict[str, Any]], None],
    say: Callable[[str], None] = lambda line: None,
    assess: Callable[[Model], float] | None = None,
) -> Trained:
    """Train a copy of `model` through the phases; goes on from the latest whole checkpoint in `folder`.

    Batches are [spec.batch, length], of whole examples; none may be longer. The master weights are float32, the forward
    and backward pass is in the model's dtype, and so is what is returned. A checkpoint is written at the end of every
    phase and when `checkpoint_seconds` have passed; all of them are on disk on return. An interrupted training that is
    called again with the same arguments ends with the same bits; a finished one is only restored.

    With LoRA (spec.lora) adapters alone learn and are in the checkpoints, the other weights stay as they are, and the
    model returned has its adapters, float32, beside the kernels: `heal_jax.model.lora.merged` makes an ordinary one of
    it.

    `log` gets step (from 1, over all phases), phase, loss (nats a token), grad_norm (before clipping), learning_rate;
    since the last line of this attempt tokens_per_second and mfu (see `Meter`); from step 1 on, over all attempts,
    tokens (padding not counted), loss_tokens, seconds and skipped: every `log_every` steps, at each phase's last, and
    where loss or gradient is not finite, with the rollouts of that batch as not_finite. Raises RunError where there is
    nothing to train on, where more steps than `max_skipped` are not finite, where a batch has no token to learn, where
    a checkpoint cannot be written, and where the one that is there is another training's. `say` gets a line for each
    damaged one. After a signal it saves, and raises Stopped. `assess`, an accuracy of a model whose
    arrays are there during the call alone, is asked at the end of every phase; the best checkpoint is kept and
    returned.
    """
    total = sum(phase.steps for phase in phases)
    if total == 0 or any(phase.steps and not phase.examples for phase in phases):
        raise RunError("there is nothing to train on: no phase has optimizer steps, or one has steps but no examples")
    transform, rate = optimizer(spec, total), rates(spec, total)
    dtype = model.params["embed"][...].dtype
    model = adapted(model, spec.lora, mesh, seed)
    trainable, frozen = split(model.params)
    target = abstract_state(model, transform, mesh)
    leaves = jax.tree.leaves((target["params"], target["opt_state"]))
    rows = train_rows(spec, batch_parts(mesh))
    pinned = None if mesh is None else tuple(leaf.sharding for leaf in leaves)
    identity = _identity(model, phases, spec, length, pad_id, seed)
    ends = set(itertools.accumulate(phase.steps for phase in phases if phase.steps))
    folder = place(folder.resolve())

    def as_model(state: dict[str, Any]) -> Model:
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), state["params"], trainable)
        return dataclasses.replace(model, params=nnx.merge_state(params, frozen))

    for line in once(lambda: keep_whole(folder, sorted(ends) if assess else ())):
        say(line)
    with opened(folder) as checkpoints, signals.deferred():
        if checkpoints.orbax.latest is None:
            state, progress, data = _initial_state(model, transform, target), Progress(), None
        else:
            state, progress, data = restore(checkpoints.orbax, target, identity)

        def assess_once() -> None:
            if assess is not None and progress.step in ends - set(checkpoints.dev):
                checkpoints.wait()
                with signals.at_once():
                    accuracy = assess(as_model(state))
                checkpoints.assessed(progress.step, accuracy)

        assess_once()
        clock, saved_at = time.monotonic() - progress.seconds, time.monotonic()
        meter = Meter(model.config, spec, length, progress)
        for at, batch, ids, stream in _steps(phases, progress.step, data, spec.batch, length, seed, pad_id):
            if not batch.mask.any():
                raise RunError(f"training step {at.step} ({at.phase}): the batch has no token to learn: {ids()[:10]}")
            placed = put_batch(mesh, filled_up(batch, rows))
            with using(mesh):
                params, opt_state, metrics = train_step(
                    model.graph,
                    transform,
                    state["params"],
                    state["opt_state"],
                    placed,
                    dtype,
                    pinned,
                    spec.remat,
                    spec.accumulate,
                    frozen,
                )
            state = {"params": params, "opt_state": opt_state}
            loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            progress = Progress(
                step=at.step,
                tokens=progress.tokens + int((batch.segments > 0).sum()),
                loss_tokens=progress.loss_tokens + int(batch.mask.sum()),
                seconds=time.monotonic() - clock,
                skipped=progress.skipped + (not finite),
            )
            if at.ends or at.step % spec.log_every == 0 or not finite:
                measured = {"loss": _number(loss), "grad_norm": _number(grad_norm)}
                measured["learning_rate"] = float(rate(at.step - 1))
                skipped = {} if finite else {"not_finite": ids()}
                log({"phase": at.phase, **measured, **dataclasses.asdict(progress), **meter.since(progress), **skipped})
            if progress.skipped > spec.max_skipped:
                raise RunError(
                    f"training step {at.step} ({at.phase}): loss {loss}, gradient norm {grad_norm}, the "
                    f"{progress.skipped}. step that is not finite (train.max_skipped: {spec.max_skipped}); its "
                    "examples are in metrics.jsonl under not_finite; lower train.learning_rate or raise train.warmup, "
                    "in a run with another --out"
                )
            # The first process decides for all: their clocks differ, and a save needs every one of them.
            due = time.monotonic() - saved_at >= checkpoint_seconds
            now = once(functools.partial(_decide, due))
            if at.ends or now:
                data = None if at.ends else stream.get_state()
                metadata = {"training": identity, "progress": dataclasses.asdict(progress), "data": data}
                once(functools.partial(require_room, folder, state))
                checkpoints.save(at.step, state, metadata)
                saved_at = time.monotonic()
            if now == "stop":  # what is to be assessed is, on going on
                checkpoints.wait()
                signals.stop()
            if at.ends:
                assess_once()
        checkpoints.wait()
        if checkpoints.best not in (None, progress.step):
            state = checkpoints.load(checkpoints.best, target)
        return Trained(as_model(state), progress, checkpoints.dev)


class At(NamedTuple):
    """A step: its phase's name, its number from 1 on over all phases, and whether it ends the phase."""

    phase: str
    step: int
    ends: bool


def _decide(due: bool) -> str:
    """What is to be done after a step: stop (save first), save, or nothing."""
    return "stop" if signals.asked() else "save" if due else ""


def _steps(
    phases: Sequence[Phase], done: int, data: Any, rows: int, length: int, seed: int, pad_id: int
) -> Iterator[tuple[At, Batch, Callable[[], list[str]], grain.DatasetIterator]]:
    """The steps after the first `done`: where they are, the batch, its rollouts' ids, and the phase's iterator, whose
    state `data` is where the first `done` end within a phase."""
    end = 0
    for index, phase in enumerate(phases):
        start, end = end, end + phase.steps
        if done >= end or start == end:
            continue
        order = int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0])
        with contextlib.closing(batches(phase.examples, rows, length, order, pad_id)) as stream:
            if done > start:
                stream.set_state(data)
            for step in range(max(done, start) + 1, end + 1):
                batch, example = unpack(next(stream))
                yield At(phase.name, step, step == end), batch, functools.partial(_ids, phase, example), stream


def _ids(phase: Phase, example: np.ndarray) -> list[str]:
    """The rollouts of a batch, of which `example` has the number at each token (-1: none)."""
    return [phase.examples[i].rollout_id for i in np.unique(example[example >= 0])]


def _number(x: float) -> float | None:
    """null in JSON, which knows no other number for it."""
    return x if math.isfinite(x) else None


def abstract_state(model: Model, transform: optax.GradientTransformation, mesh: Mesh | None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of {params, opt_state}, of what learns; float32 weights, moments sharded like their
    weights.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), split(model.params)[0])
    opt_state = jax.eval_shape(transform.init, params)
    if mesh is None:
        whole: Any = SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: whole, (params, opt_state))
    else:
        whole = NamedSharding(mesh, PartitionSpec())
        of_params, _ = split(shardings(model, mesh))
        of_moments = optax.tree_utils.tree_map_params(
            transform, lambda _, place: place, opt_state, of_params, transform_non_params=lambda _: whole
        )
        places = of_params, of_moments
    params, opt_state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, opt_state), places
    )
    return {"params": params, "opt_state": opt_state}


def _initial_state(model: Model, transform: optax.GradientTransformation, target: dict[str, Any]) -> dict[str, Any]:
    """A copy of the weights that learn (steps donate theirs) and a fresh optimizer state, placed as in `target`."""
    weights = _copy(split(model.params)[0])
    params = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), weights, target["params"])
    places = jax.tree.map(lambda t: t.sharding, target["opt_state"])
    return {"params": params, "opt_state": jax.jit(transform.init, out_shardings=places)(params)}


@jax.jit
def _copy(params: nnx.State) -> nnx.State:
    """In float32. Not device_put(may_alias=False): from one device to a mesh it aliases all the same."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), params)


def _identity(
    model: Model, phases: Sequence[Phase], spec: TrainSpec, length: int, pad_id: int, seed: int
) -> dict[str, Any]:
    """What a checkpoint must agree with, as JSON: all that decides the weights but the first ones."""
    data = hashlib.sha256()
    for phase in phases:
        rows = [(example.tokens, example.prompt_length) for example in phase.examples]
        data.update(repr((phase.steps, rows)).encode())
    shape = {"length": length, "pad_id": pad_id, "seed": seed}
    model_fields = {"dtype": str(model.params["embed"][...].dtype), **dataclasses.asdict(model.config)}
    whole = {"model": model_fields, "train": dataclasses.asdict(spec), "batches": shape, "phases": data.hexdigest()}
    return json.loads(json.dumps(whole))  # as it comes back from a checkpoint
