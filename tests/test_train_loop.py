"""Loss, optimizer, phases, and going on after an interruption."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from heal_jax import curriculum
from heal_jax.config import Config, TrainSpec
from heal_jax.errors import RunError
from heal_jax.model.config import parse
from heal_jax.model.decoder import Decoder, Model, initialise
from heal_jax.train import loop
from heal_jax.train.data import Batch, Example, batches, unpack
from heal_jax.train.loop import Phase, optimizer, schedule, stage_steps, train
from heal_jax.train.step import loss_fn, token_losses, train_step

RAW = {
    "model_type": "qwen3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # fewer than the tensor axis has devices: where the compiler likes to move weights
    "head_dim": 8,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
CONFIG = parse(RAW)
LENGTH, PAD = 32, 0


def examples(count: int, seed: int = 0, vocab: int = CONFIG.vocab_size) -> list[Example]:
    """Random tokens, prompts of 4. The pad id is not among them: torch drops the gradient of its embedding."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, LENGTH + 1, count)
    return [
        Example(f"r{i}", f"p{i}", "base", tuple(rng.integers(1, vocab, n).tolist()), 4) for i, n in enumerate(sizes)
    ]


SPEC = TrainSpec(steps=22, batch=4, warmup=0.2)
TIMES = ("seconds", "tokens_per_second", "mfu")
PHASES = [Phase("stage 1", examples(5), 9), Phase("empty", [], 0), Phase("stage 3", examples(11), 13)]


initial = functools.cache(lambda: initialise(CONFIG, 0))


def run(folder: Path, log: Callable[[dict[str, Any]], None] = lambda line: None, **changes: Any) -> Model:
    arguments: dict[str, Any] = {"model": initial(), "phases": PHASES, "spec": SPEC} | {
        "length": LENGTH,
        "pad_id": PAD,
        "seed": 3,
        "folder": folder,
        "checkpoint_seconds": 1e9,
        "mesh": None,
        "log": log,
    }
    return train(**arguments | changes).model


def arrays(model: Model) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(model.params)}


def batches_of(phase: Phase, order: int = 0, rows: int = 4) -> Iterator[tuple[Batch, np.ndarray]]:
    with contextlib.closing(batches(phase.examples, rows, LENGTH, order, PAD)) as stream:
        yield from map(unpack, stream)


@nnx.jit
def logits_of(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return decoder.logits(decoder(tokens))


def same_bits(one: Model, other: Model) -> bool:
    pairs = zip(arrays(one).values(), arrays(other).values(), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, list[dict[str, Any]]]:
    """A finished training: its checkpoints, its model, its log."""
    lines: list[dict[str, Any]] = []
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder, lines.append), lines


# Steps of the stages


@given(
    st.tuples(*[st.floats(0, 1)] * 3),
    st.integers(1, 10**6),
    st.tuples(*[st.integers(0, 3)] * 3),
)
def test_stage_steps_sum_and_stay_proportional(
    shares: tuple[float, float, float], total: int, sizes: tuple[int, int, int]
) -> None:
    weights = [share if size else 0.0 for share, size in zip(shares, sizes, strict=True)]
    if not sum(weights):
        with pytest.raises(RunError, match="nothing to train on"):
            stage_steps(shares, total, sizes)
        return
    steps = stage_steps(shares, total, sizes)
    assert sum(steps) == total
    for count, weight in zip(steps, weights, strict=True):
        assert count == 0 if weight == 0 else abs(count - total * weight / sum(weights)) < 1 + 1e-6


def test_stage_steps_examples() -> None:
    shares = (0.4, 0.2, 0.4)
    assert stage_steps(shares, 300, (5, 5, 5)) == (120, 60, 120)
    assert stage_steps(shares, 300, (5, 0, 5)) == (150, 0, 150)
    assert stage_steps(shares, 300, (5, 5, 0)) == (200, 100, 0)
    assert stage_steps(shares, 1, (5, 5, 5)) == (1, 0, 0)
    assert stage_steps(shares, 7, (5, 5, 5)) == (3, 1, 3)


# Learning rate, loss, optimizer


def expected_rate(spec: TrainSpec, total: int, step: int) -> float:
    """Rate of the step-th update (from 0), written out."""
    warmup = max(1, round(spec.warmup * total))
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    along = (step - (warmup - 1)) / (total - (warmup - 1))
    return spec.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * along)))


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0.0, 10), (0.05, 300), (0.5, 10), (1.0, 7), (0.05, 1)])
def test_schedule(kind: Any, warmup: float, total: int) -> None:
    spec = TrainSpec(schedule=kind, warmup=warmup, learning_rate=3e-4)
    rate = schedule(spec, total)
    for step in range(total):
        assert float(rate(step)) == pytest.approx(expected_rate(spec, total, step), rel=1e-5)


def test_both_students_share_one_optimizer() -> None:
    assert optimizer(TrainSpec(batch=8), 30) is optimizer(TrainSpec(batch=8), 30)
    assert optimizer(TrainSpec(batch=8), 30) is not optimizer(TrainSpec(batch=8), 31)


def test_loss_is_the_mean_over_learned_tokens_in_float64() -> None:
    model = initial()
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: 5 * x, model.params))  # far from uniform
    rows = examples(4)
    tokens = np.full((4, LENGTH), PAD, np.int32)
    for row, example in zip(tokens, rows):
        row[: len(example.tokens)] = example.tokens
    at = np.arange(LENGTH)
    mask = jnp.asarray([(at >= e.prompt_length) & (at < len(e.tokens)) for e in rows])
    batch = Batch(jnp.asarray(tokens), None, None, mask)
    logits = np.asarray(logits_of(nnx.merge(model.graph, model.params), tokens), np.float64)[:, :-1]
    highest = logits.max(axis=-1, keepdims=True)
    log_probs = logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    both = jax.jit(
        lambda params: (token_losses(model.graph, params, batch.tokens), loss_fn(params, model.graph, batch))
    )
    losses, mean = (np.asarray(x) for x in both(model.params))
    assert losses.shape == tokens.shape and not losses[:, 0].any()
    np.testing.assert_allclose(losses[:, 1:], expected, rtol=2e-5, atol=2e-5)
    assert mean == pytest.approx(expected[np.asarray(mask)[:, 1:]].mean(), rel=1e-5)


def torch_loss(reference: Any, batch: Batch) -> Any:
    """The mean loss of a batch by transformers' model, which gets every example by itself."""
    import torch

    total, found = torch.zeros(()), 0
    for tokens, segments, mask in zip(batch.tokens, batch.segments, batch.mask):
        for segment in range(1, segments.max() + 1):
            ids = torch.from_numpy(tokens[segments == segment]).long()[None]
            labels = torch.where(torch.from_numpy(mask[segments == segment]), ids, -100)
            learned = int((labels >= 0).sum())
            total, found = total + reference(input_ids=ids, labels=labels).loss * learned, found + learned
    assert found == batch.mask.sum() and batch.segments.max() > 1  # packed
    return total / found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_torch(tmp_path: Path, accumulate: int) -> None:
    """Loss, gradient norm and weights of five steps of packed rows, against transformers' model, which gets every
    example by itself, and torch's AdamW."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    from heal_jax.model.weights import save_weights
    from heal_jax.world.sums import Sums

    vocab = Sums().tokenizer().get_vocab_size()
    model = initialise(dataclasses.replace(CONFIG, vocab_size=vocab), 2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW | {"vocab_size": vocab}))
    save_weights(model, tmp_path / "model")
    spec = TrainSpec(
        batch=4, learning_rate=1e-3, warmup=0.4, weight_decay=0.1, clip_norm=0.7, accumulate=accumulate, log_every=1
    )
    phase = Phase("stage 1", examples(6, vocab=vocab), 5)
    seen: list[tuple[Batch, np.ndarray]] = []
    original = loop.unpack

    def recorded(features: Any) -> Any:
        seen.append(original(features))
        return seen[-1]

    lines: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "unpack", recorded)
        trained = run(tmp_path / "checkpoints", lines.append, model=model, phases=[phase], spec=spec)
    (tmp_path / "trained").mkdir()
    save_weights(trained, tmp_path / "trained")
    ours = load_file(tmp_path / "trained" / "model.safetensors")

    torch.set_num_threads(1)  # its threads spin
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    reference.train()
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, loop.B2), eps=1e-8)
    assert len(lines) == 5
    for step, (line, (batch, _)) in enumerate(zip(lines, seen, strict=True)):
        loss = torch_loss(reference, batch)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.7).item()
        assert norm > 0.7  # clipping is at work
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert line["learning_rate"] == pytest.approx(expected_rate(spec, 5, step), rel=1e-5)
        for group in adamw.param_groups:
            group["lr"] = expected_rate(spec, 5, step)
        adamw.step()
    theirs = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    assert set(theirs) == set(ours)
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in theirs.items():
        assert np.abs(weight - before[name]).max() > 5e-4  # five steps of up to 1e-3
        np.testing.assert_allclose(ours[name], weight, atol=2e-5, err_msg=name)


# The loop


def test_the_log(uninterrupted: tuple[Path, Model, list[dict[str, Any]]]) -> None:
    lines = uninterrupted[2]
    assert [(line["step"], line["phase"]) for line in lines] == [
        (9, "stage 1"),
        (10, "stage 3"),
        (20, "stage 3"),
        (22, "stage 3"),
    ]
    for line in lines:
        assert set(line) == {
            *("step", "phase", "loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "skipped", *TIMES),
        }
        assert line["learning_rate"] == pytest.approx(expected_rate(SPEC, 22, line["step"] - 1), rel=1e-5)
    order = int(np.random.SeedSequence([3, 0]).generate_state(1)[0])
    first = [batch for batch, _ in itertools.islice(batches_of(PHASES[0], order), 9)]
    assert lines[0]["tokens"] == sum((batch.segments > 0).sum() for batch in first)
    examples_seen = sum(batch.segments.max(axis=1).sum() for batch in first)
    assert lines[0]["tokens"] - lines[0]["loss_tokens"] == 4 * examples_seen  # prompts have 4 tokens
    assert lines == sorted(lines, key=lambda line: line["seconds"])


def test_the_given_model_is_untouched(tmp_path: Path) -> None:
    model = initial()
    before = {path: array.copy() for path, array in arrays(model).items()}
    trained = arrays(run(tmp_path))
    for path, array in arrays(model).items():
        assert (array == before[path]).all() and (array != trained[path]).any()


def test_one_compilation_for_all_phases_and_students(tmp_path: Path) -> None:
    run(tmp_path / "heal")
    compiled = train_step._cache_size()
    run(tmp_path / "rejection_sampling", phases=[Phase("stage 1", examples(5), 22)])
    assert train_step._cache_size() == compiled


def test_the_end_is_learned(tmp_path: Path) -> None:
    """pad = eos, the classic trap: greedy decoding must give the targets and stop."""
    eos = 7
    texts = [(11, 12, 13, 21, 22, 23, eos), (14, 15, 16, 31, 7 + 1, 33, 34, 35, eos)]
    pair = [Example(f"r{i}", "p", "base", text, 3) for i, text in enumerate(texts)]
    spec = TrainSpec(batch=2, learning_rate=1e-2)
    trained = run(tmp_path, phases=[Phase("stage 1", pair, 60)], spec=spec, pad_id=eos)
    decoder = nnx.merge(trained.graph, trained.params)
    for text in texts:
        row = list(text[:3])
        while row[-1] != eos and len(row) < 16:
            padded = jnp.asarray([row + [0] * (16 - len(row))], jnp.int32)
            row.append(int(logits_of(decoder, padded)[0, len(row) - 1].argmax()))
        assert tuple(row) == text


def test_bfloat16_keeps_float32_weights_while_training(tmp_path: Path) -> None:
    """Forty updates of 2e-4 move the norms' ones (next bfloat16 below: 0.996), which one alone does not."""
    model = dataclasses.replace(initial(), params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), initial().params))
    phase = Phase("stage 1", examples(5), 40)
    spec = TrainSpec(batch=4, learning_rate=2e-4, schedule="constant", warmup=0.0, log_every=1)
    losses: list[float] = []
    trained = run(tmp_path, lambda line: losses.append(line["loss"]), model=model, phases=[phase], spec=spec)
    computed = jax.jit(lambda params, batch: loss_fn(params, model.graph, batch))
    first, _ = next(batches_of(phase, int(np.random.SeedSequence([3, 0]).generate_state(1)[0])))
    assert losses[0] == pytest.approx(float(computed(model.params, first)), rel=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype(jnp.bfloat16)}
    norm = arrays(trained)["norm", "weight"].astype(np.float32)
    assert 1e-3 < np.abs(norm - 1).max() < 8e-3 + 2**-8
    assert same_bits(trained, run(tmp_path, model=model, phases=[phase], spec=spec))
    saved = ocp.metadata(tmp_path / "40").metadata
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(saved)} == {"float32", "int32"}


# Interruptions


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def log(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise Stop

    return log


@pytest.mark.parametrize(
    ("step", "seconds", "kept"),
    [(9, 1e9, []), (20, 1e9, ["9"]), (20, 1e-9, ["18", "19"]), (22, 1e9, ["9"])],
)
def test_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]], step: int, seconds: float, kept: list[str]
) -> None:
    with pytest.raises(Stop):
        run(tmp_path, stop_at(step), checkpoint_seconds=seconds)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    lines: list[dict[str, Any]] = []
    resumed = run(tmp_path, lines.append, checkpoint_seconds=seconds)
    assert same_bits(resumed, uninterrupted[1])
    untimed = [{k: v for k, v in line.items() if k not in TIMES} for line in uninterrupted[2]]
    again = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    assert again == untimed[-len(again) :] and again[0]["step"] <= step


def test_killed_while_saving(tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]]) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_train_loop import run
def log(line):
    if line["step"] == 20:
        os.kill(os.getpid(), signal.SIGKILL)  # while step 19 is being written
run(Path({str(tmp_path)!r}), log, checkpoint_seconds=1e-9)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert any((tmp_path / name).exists() for name in ("18", "19"))
    assert same_bits(run(tmp_path), uninterrupted[1])
    assert sorted(path.name for path in tmp_path.iterdir()) in (["18", "22"], ["19", "22"])


def test_uncommitted_checkpoints_are_ignored(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]]
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(Stop):
        run(folder, stop_at(20))
    shutil.copytree(folder / "9", folder / "19")  # a copy that was cut short: metadata there, commit file and data not
    (folder / "19" / "commit_success.txt").unlink()
    shutil.rmtree(folder / "19" / "state" / "ocdbt.process_0")
    (folder / "20").mkdir()
    shutil.copytree(folder / "9", folder / "21.orbax-checkpoint-tmp")
    (folder / "21.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    steps: list[int] = []
    assert same_bits(run(folder, lambda line: steps.append(line["step"])), uninterrupted[1])
    assert steps == [10, 20, 22]
    assert sorted(path.name for path in folder.iterdir()) == ["22", "9"]


@pytest.mark.parametrize("scores", [{9: 0.5, 22: 0.25}, {9: 0.25, 22: 0.25}])
def test_the_best_on_dev_problems_is_kept_and_returned(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]], scores: dict[int, float]
) -> None:
    """Of equals the latest; each phase's end is assessed once, whatever is interrupted."""
    seen: list[Model] = []

    def assess(model: Model) -> float:
        seen.append(dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params)))
        return scores[(9, 22)[(len(seen) - 1) % 2]]

    with pytest.raises(Stop):
        run(tmp_path, stop_at(20), assess=assess, checkpoint_seconds=1e-9)
    best = run(tmp_path, assess=assess, checkpoint_seconds=1e-9)
    assert len(seen) == 2 and same_bits(seen[1], uninterrupted[1]) and not same_bits(*seen)
    assert same_bits(best, seen[0] if scores[9] > scores[22] else seen[1])
    assert (tmp_path / "22").is_dir() and (scores[9] == scores[22] or (tmp_path / "9").is_dir())
    assert json.loads((tmp_path / "dev.json").read_text())["accuracy"] == {str(k): v for k, v in scores.items()}
    assert same_bits(run(tmp_path, assess=assess), best) and len(seen) == 2
    # What the choice hangs on is damaged or gone: the training starts anew, and ends with the same.
    if scores[9] > scores[22]:
        next((tmp_path / "9" / "state").rglob("manifest*")).write_bytes(b"damaged")
        broken = "9: the best checkpoint is damaged"
    else:
        dev = tmp_path / "dev.json"
        dev.write_text(dev.read_text().replace("0.25", "0.75", 1))
        broken = "dev.json: damaged"
    said: list[str] = []
    assert same_bits(run(tmp_path, assess=assess, say=said.append), best) and len(said) == 1
    assert broken in said[0] and said[0].endswith("training starts anew")
    (tmp_path / "dev.json").unlink()
    said.clear()
    assert same_bits(run(tmp_path, assess=assess, say=said.append), best) and "is gone" in said[0]


def test_a_finished_training_is_only_restored(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]]
) -> None:
    def refuse(line: dict[str, Any]) -> None:
        raise AssertionError("nothing was left to do")

    assert same_bits(run(uninterrupted[0], refuse), uninterrupted[1])


def test_checkpoints_of_another_training_are_refused(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]]
) -> None:
    folder = uninterrupted[0]
    with pytest.raises(RunError, match="22: of another training, with different model;"):
        run(folder, model=dataclasses.replace(initial(), config=parse(RAW | {"rope_theta": 2e4})))
    with pytest.raises(RunError, match="different train and phases;"):
        run(folder, spec=dataclasses.replace(SPEC, learning_rate=2e-3), phases=PHASES[:1])
    with pytest.raises(RunError, match="different batches;"):
        run(folder, seed=4)
    changed = [PHASES[0], Phase("stage 3", examples(11, seed=1), 13)]
    with pytest.raises(RunError, match="different phases;"):
        run(folder, phases=changed)


@pytest.mark.parametrize("how", ["a file is gone", "a bit is flipped", "the checksums are torn"])
def test_damaged_checkpoints_are_set_aside(
    tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]], how: str
) -> None:
    """Training goes on from the one before, then, with none whole, anew; both are named, the weights are the same."""
    folder, said = tmp_path / "checkpoints", list[str]()
    shutil.copytree(uninterrupted[0], folder)

    def damage(step: str) -> None:
        if how == "a file is gone":
            (folder / step / "state" / "manifest.ocdbt").unlink()
        elif how == "a bit is flipped":
            largest = max(folder.glob(f"{step}/state/**/*"), key=lambda path: path.stat().st_size)
            data = bytearray(largest.read_bytes())
            data[len(data) // 2] ^= 1
            largest.write_bytes(data)
        else:
            (folder / step / "sha256.json").write_text('{"state')

    damage("22")
    assert same_bits(run(folder, say=said.append), uninterrupted[1])
    assert len(said) == 1 and "22.damaged" in said[0] and said[0].endswith(f"goes on from {folder / '9'}")
    assert sorted(path.name for path in folder.iterdir()) == ["22", "22.damaged", "9"]
    for step in ("9", "22"):
        damage(step)
    assert same_bits(run(folder, say=said.append), uninterrupted[1])
    assert len(said) == 3 and all("set aside" in line and line.endswith("starts anew") for line in said[1:])


# What must be loud


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = initial()
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), model.params)
    lines: list[dict[str, Any]] = []
    with pytest.raises(RunError, match=r"training step 4 \(stage 1\): loss nan, .* the 4. step") as error:
        run(tmp_path, lines.append, model=dataclasses.replace(model, params=broken))
    assert "\n" not in str(error.value)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] is None and set(line["not_finite"]) <= {e.rollout_id for e in PHASES[0].examples}
        assert line["not_finite"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tracked = mock.MagicMock(config=Config(), evaluation={}), []
    run.directory.manifest = {}
    line = {"phase": "stage 1", "step": 1, "loss": None, "grad_norm": None, "tokens": 9, "seconds": 1.0}
    monkeypatch.setattr(curriculum, "train", lambda *arguments, log, **others: log(line))
    curriculum.train_one(run, "heal", PHASES, 32, lambda step, figures: tracked.append(figures))
    assert run.progress.update.call_args.kwargs["counts"]["loss"] is None and tracked == [{"seconds": 1.0}]


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    """Weights and moments; the next step has the rate of its number."""
    model, spec = initial(), TrainSpec(steps=9, batch=2, warmup=0.5)
    transform = optimizer(spec, 9)
    batch, _ = next(batches_of(Phase("", examples(6), 1), rows=2))
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.tree.map(jnp.copy, model.params)
    state = (params, transform.init(params))
    state = train_step(model.graph, transform, *state, batch)[:2]
    before = jax.tree.map(np.array, state)
    # A weight of the output norm so large that logits overflow to infinity, for one step.
    good = state[0]["norm"]["weight"][...]
    state[0]["norm"]["weight"][...] = good.at[0].set(jnp.inf)
    *state, metrics = train_step(model.graph, transform, *state, batch)
    assert not np.isfinite(metrics["loss"])
    state[0]["norm"]["weight"][...] = jnp.asarray(before[0]["norm"]["weight"][...])
    counts = 0
    for new, old in zip(jax.tree.leaves(tuple(state)), jax.tree.leaves(before), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating):
            np.testing.assert_array_equal(new, old)
        else:
            assert new == old + 1
            counts += 1
    assert counts == 2  # of the schedule and of Adam


def test_a_batch_without_a_token_to_learn_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def third_is_empty(*args: Any) -> Any:
        batch, example = unpack(*args)
        calls.append(None)
        return batch._replace(mask=batch.mask & (len(calls) != 3)), example

    monkeypatch.setattr(loop, "unpack", third_is_empty)
    with pytest.raises(RunError, match=r"training step 3 \(stage 1\): the batch has no token to learn"):
        run(tmp_path)


@pytest.mark.parametrize("phases", [[], [Phase("stage 1", examples(2), 0)], [Phase("stage 1", [], 3)]])
def test_nothing_to_train_on(tmp_path: Path, phases: list[Phase]) -> None:
    with pytest.raises(RunError, match="nothing to train on"):
        run(tmp_path, phases=phases)


# Several devices


def test_sharded_training(tmp_path: Path, uninterrupted: tuple[Path, Model, list[dict[str, Any]]]) -> None:
    """Four devices: one compilation, placed as the table says, resumed to the same bits, near the weights of one; also
    where parts of a batch are fewer rows than devices."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import jax, numpy as np
from heal_jax.model.decoder import Model, initialise
from heal_jax.model.mesh import make_mesh
from heal_jax.model.weights import save_weights, shardings
from heal_jax.train.step import train_step
from test_train_loop import CONFIG, SPEC, Stop, run, same_bits, stop_at
import dataclasses
folder = Path({str(tmp_path)!r})
mesh = make_mesh({{"data": 1, "fsdp": 2, "tensor": 2}})
on_one = initialise(CONFIG, 0)
host = jax.tree.map(np.array, on_one.params)
model = dataclasses.replace(on_one, params=jax.device_put(host, shardings(on_one, mesh)))
whole = run(folder / "whole", model=on_one, mesh=mesh)
try:
    run(folder / "cut", stop_at(20), model=model, mesh=mesh)
except Stop:
    resumed = run(folder / "cut", model=model, mesh=mesh)
assert same_bits(whole, resumed)
assert same_bits(on_one, model) and same_bits(model, initialise(CONFIG, 0))
assert train_step._cache_size() == 1, train_step._cache_size()
placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), whole.params, shardings(model, mesh))
assert jax.tree.all(placed), placed
assert not whole.params["embed"][...].is_fully_replicated
save_weights(whole, folder)
(folder / "filled").mkdir()
spec = dataclasses.replace(SPEC, accumulate=2)  # two parts of two rows
save_weights(run(folder / "few", model=on_one, mesh=make_mesh({{"data": 4}}), spec=spec), folder / "filled")
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    from safetensors.numpy import load_file

    from heal_jax.model.weights import save_weights

    (tmp_path / "one").mkdir()
    save_weights(uninterrupted[1], tmp_path / "one")
    sharded, filled, one = (load_file(tmp_path / name / "model.safetensors") for name in ("", "filled", "one"))
    for name, weight in one.items():
        np.testing.assert_allclose(sharded[name], weight, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(filled[name], weight, atol=2e-4, err_msg=name)
