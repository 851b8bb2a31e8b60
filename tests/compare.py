"""Runs at other meshes or with other processes, compared as DESIGN's "Same bytes" allows."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import COMMAND, ENVIRONMENT, TINY
from flax import nnx
from safetensors.numpy import load_file

from heal_jax.rollout.draw import block_width
from heal_jax.rollout.generate import key_of
from heal_jax.store import RunDirectory, read_table
from heal_jax.train.data import read_stage

TIE = 1e-3  # perturbed logits this close may be drawn either way
CLOSE = 1e-3  # entropies and log-probabilities; logits are within 1e-4
EIGHT = {"data": 8}
# Four attention heads and two key-value heads, so that the student can be split over tensor, too.
SETTINGS = ("--student.path", "builtin:teacher")


def environment(devices: int, **more: str) -> dict[str, str]:
    """Fake CPU devices, and threads enough for their collectives not to wait for each other."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = f"{Path(COMMAND[0]).parent}:{os.environ['PATH']}"  # the `heal` of this Python
    return ENVIRONMENT | {"NPROC": "16", "XLA_FLAGS": flags, "PATH": path} | more


def mesh_arguments(**mesh: int) -> list[str]:
    return [text for axis in ("data", "fsdp", "tensor") for text in (f"--mesh.{axis}", str(mesh.get(axis, 1)))]


def finished(out: Path, **mesh: int) -> Path:
    """A run of configs/tiny.yaml by one process at this mesh."""
    arguments = ["run", TINY, "--out", out, *SETTINGS, *mesh_arguments(**mesh)]
    devices = int(np.prod(list(mesh.values())))
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment(devices), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return out


def perturbed_logits(lm, context, rollout_id, step):
    """How far each token was from being drawn, recomputed: raw logits after `context` and the rollout's own noise, by
    which a block of the vocabulary is drawn and then a token of it. 0 is the best; both steps' distances add up.
    """
    decoder = nnx.merge(lm.model.graph, lm.model.params)
    logits = decoder.logits(decoder(jnp.asarray([context], jnp.int32))[:, -1])[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key_of(rollout_id)), impl="threefry2x32"), step)
    width = block_width(len(logits))
    blocks, noise = logits.reshape(-1, width), jax.random.gumbel(key, (len(logits) // width + width,))
    block = jax.nn.logsumexp(blocks, axis=1) + noise[: len(blocks)]
    within = blocks + noise[len(blocks) :]
    distance = (block - block.max())[:, None] + within - within.max(axis=1, keepdims=True)
    return np.asarray(distance).ravel()


def first_difference(a, b):
    """Index of the first token that is not the same, None where all are."""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    return min(len(a), len(b)) if same is None and len(a) != len(b) else same


def same_rollout(lm, context, rollout_id, a, b, tie=TIE) -> bool:
    """Whether two token lists are equal; they may part only where the two tokens are the best, and within `tie`."""
    at = first_difference(a, b)
    if at is None:
        return True
    assert at < min(len(a), len(b)), f"{rollout_id}: one is a beginning of the other"
    values = perturbed_logits(lm, [*context, *a[:at]], rollout_id, at)
    gaps = [float(values.max() - values[token]) for token in (a[at], b[at])]
    assert max(gaps) <= tie, f"{rollout_id}: token {at} is {a[at]} and {b[at]}, {gaps} below the best"
    return False


def same_rollouts(lm, one: Path, other: Path) -> int:
    """Compare the teacher's rollouts of two runs and their records. How many parted."""
    parted = 0
    for kind in ("base", "hindsight", "repair"):
        rows = [
            {row["rollout_id"]: row for row in RunDirectory(out).rollouts(kind).to_pylist()} for out in (one, other)
        ]
        # Which rollouts there are follows from the earlier ones.
        assert parted or set(rows[0]) == set(rows[1])
        for name in set(rows[0]) & set(rows[1]):
            a, b = rows[0][name], rows[1][name]
            if a["context_tokens"] != b["context_tokens"]:
                assert parted
                continue
            kept = a["kept_tokens"] or 0
            drawn = [row["tokens"][kept:] for row in (a, b)]
            parted += not same_rollout(lm, a["context_tokens"], name, *drawn)
            common = first_difference(*drawn)
            for column in ("entropy", "logprob", "sampling_logprob"):
                np.testing.assert_allclose(
                    a[column][:common], b[column][:common], atol=CLOSE, err_msg=f"{name} {column}"
                )
            if common is None:
                assert (a["grade"], a["step_starts"], a["finish"]) == (b["grade"], b["step_starts"], b["finish"])
                if a["pure_score"] is not None:
                    np.testing.assert_allclose(a["pure_score"], b["pure_score"], atol=1e-3)
    return parted


def same_run(lm, one: Path, other: Path) -> int:
    """Compare two finished runs: rollouts, their records, training losses, weights. How many rollouts parted."""
    parted = same_rollouts(lm, one, other)
    for model in ("teacher", "student_base"):
        tables = [read_table(out / "evaluation" / f"{model}-00000.parquet").to_pylist() for out in (one, other)]
        for a, b in zip(*tables, strict=True):
            context = lm.tokenizer.prompt(questions(one)[a["problem_id"]])
            name = f"{a['problem_id']}/evaluate/{a['sample']}/s0"
            parted += not same_rollout(lm, context, name, a["tokens"], b["tokens"])
    if not parted:
        stages = [[read_stage(folder) for folder in sorted(out.glob("curriculum/stage*"))] for out in (one, other)]
        assert stages[0] == stages[1]
        losses = [[line["loss"] for line in metrics(out)] for out in (one, other)]
        np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
        weights = [load_file(out / "export" / "model.safetensors") for out in (one, other)]
        assert set(weights[0]) == set(weights[1])
        for name in weights[0]:
            np.testing.assert_allclose(weights[0][name], weights[1][name], atol=1e-4, err_msg=name)
    return parted


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


def questions(out: Path) -> dict[str, str]:
    """The questions of the held-out problems of a run."""
    from heal_jax.config import load as load_config
    from heal_jax.problems.sources import load

    config = load_config(out / "config.yaml")
    return {p.id: p.question for p in load(config.evaluate.problems, config.grade.by, "evaluate.problems")}
