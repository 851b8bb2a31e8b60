"""What a run survives: kills, signals, damage, full disks, too little memory, partial stages, another mesh."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import test_train_loop as training
from conftest import COMMAND, ENVIRONMENT, TINY, refused

from heal_jax import pipeline
from heal_jax.bench import faults
from heal_jax.bench.faults import STAGES, Disturbed, content
from heal_jax.config import ModelSpec
from heal_jax.lock import lock
from heal_jax.model.lm import resolve
from heal_jax.model.mesh import make_mesh
from heal_jax.progress import Progress
from heal_jax.store import RunDirectory
from heal_jax.train import loop

TIMES = {"start-up": 3.0, "sample": 1.0, "hindsight": 0.5, "repair": 0.5, "curate": 0.1, "train": 1.0, "evaluate": 1.0,
         "export": 0.1}  # fmt: skip
FUTURE = 4e9  # seconds since 1970


def heal(*arguments: object, status: int = 0, **how: Any) -> str:
    """What a command says on stderr."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, **how)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, without a trace in its times."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


# Kills and signals


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tiny):
    found = faults.measure(TINY, 5, Progress(quiet=True), whole=tiny[0], environment=ENVIRONMENT)
    assert sum(found["kills"].values()) == 5 and sum(count > 0 for count in found["kills"].values()) >= 3
    assert found["rollouts"] == RunDirectory(tiny[0]).rollouts().num_rows
    assert (found["lost"], found["duplicated"], found["shards_made_again"]) == (0, 0, 0)
    assert found["differing"] == []


def test_stopped_anywhere_with_a_curriculum_of_half_the_rollouts(tiny, tmp_path):
    """A full disk, Ctrl-C after the first shard, `heal curate` and `heal train` on that, and then SIGTERM in a stage of
    each kind: the same bytes as an undisturbed run's. Meanwhile the clock goes backwards.
    """
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(TINY.read_text() + "checkpoint: {seconds: 0.01}\n")  # a checkpoint after every step

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    said = heal("sample", config, "--out", out, "--quiet", status=1, preexec_fn=small)
    assert said.startswith("heal: ") and "\n" not in said and "make room" in said
    assert not list(out.glob("rollouts/*.parquet"))

    run = Disturbed(config, out, dict(TIMES), ENVIRONMENT)
    for _ in range(5):  # on a busy machine the second shard may be there before this sees the first
        sampling = subprocess.Popen([*run.command], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while not RunDirectory(out).manifest["shards"] and sampling.poll() is None:
            time.sleep(faults.POLL)
        sampling.send_signal(signal.SIGINT)
        _, said = sampling.communicate(timeout=120)
        assert sampling.returncode == 130
        assert said.strip().endswith("heal: interrupted; the same command goes on where it stopped")
        if "sample" not in RunDirectory(out).manifest["stages"]:
            break
        shutil.rmtree(out)
    assert "sample" not in RunDirectory(out).manifest["stages"]

    said = heal("curate", config, "--out", out)
    assert "not finished are sample, hindsight, repair" in said and "of 12 problems have all" in said
    assert "stage 2 is empty: it is skipped" in said and "stage 3 is empty: it is skipped" in said
    heal("train", config, "--out", out, "--quiet")
    some, every = (RunDirectory(path).manifest["stages"]["train"]["heal"]["phases"] for path in (out, tiny[0]))
    assert some[-1]["examples"] < every[-1]["examples"]

    hit, said = [], ""
    for stage in ("hindsight", "curate", "train", "evaluate"):
        for path in out.rglob("*"):
            os.utime(path, (FUTURE, FUTURE))
        ended = run.attempt(stage, 0.5, signal.SIGTERM)
        said += ended.said
        if ended.place:
            hit.append(ended.place)
            assert ended.status == 143 and ended.said.splitlines()[-1].startswith("heal: terminated"), ended.said
    assert len(set(hit)) >= 3, hit
    said += run.attempt().said
    assert "more than checkpoint.seconds (0.01)" in said and "sample.rounds" in said
    assert "curate     is done again" in said and "train      is done again" in said
    assert content(out) == content(tiny[0])


BLOCKED = """
import hashlib, sys
from heal_jax import signals
signals.GRACE = signals.AGAIN = 0.5
signals.install()
with signals.deferred():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # as a compiler: no Python until it is done
"""


@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_while_compiled_code_runs(number, times):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)  # two signals at once would be one
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "in the middle of work" in said and said.strip().count("\n") == 0


# Damage


def test_what_is_damaged_is_made_again(tiny, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(tiny[0], out)
    flip(out / "rollouts" / "base-00001.parquet")
    tear(out / "evaluation" / "heal-00000.parquet")
    (out / "evaluation" / "teacher-00000.parquet").unlink()
    for name in ("problems.parquet", "decisions.parquet", "config.yaml", "export/model.safetensors"):
        flip(out / name)
    flip(next(out.glob("curriculum/stage1/*array_record*")))
    step = max((out / "checkpoints" / "heal").glob("[0-9]*"), key=lambda path: int(path.name))
    flip(max((step / "state").rglob("*"), key=lambda path: path.stat().st_size))
    tear(out / "manifest.json")
    left = [out / "rollouts" / f"{name}-00000.parquet" for name in ("base", "hindsight", "repair")]
    before = [path.stat().st_mtime_ns for path in left]

    said = heal("run", TINY, "--out", out)
    tables = ("base-00001", "heal-00000", "teacher-00000", "problems", "decisions")
    others = ("manifest.json", "config.yaml", "array_record", "model.safetensors", f"heal/{step.name}")
    for name in (*(f"{table}.parquet" for table in tables), *others):
        assert any(line.startswith("note: ") and name in line for line in said.splitlines()), name
    assert "going on from manifest.json.backup" in said and "base-00001.parquet.damaged" in said
    for name in ("hindsight", "repair", "train"):
        assert f"{name:<10} done before" in said
    assert [path.stat().st_mtime_ns for path in left] == before
    assert (out / "rollouts" / "base-00001.parquet.damaged").is_file()
    assert step.with_name(f"{step.name}.damaged").is_dir()
    assert content(out) == content(tiny[0])


def test_both_manifests_damaged(tiny, tmp_path, capsys):
    shutil.copytree(tiny[0], tmp_path, dirs_exist_ok=True)
    for name in ("manifest.json", "manifest.json.backup"):
        flip(tmp_path / name)
    before = content(tmp_path)
    said = refused(capsys, "run", TINY, "--out", tmp_path)
    assert "manifest.json: damaged" in said and "manifest.json.backup" in said
    assert content(tmp_path) == before


def test_rollouts_of_other_inputs_are_kept_aside(tmp_path):
    """Where unaided rollouts change under a stage that was made from them, it starts over."""
    directory = RunDirectory(tmp_path)
    directory.shard("rollouts/base-00000", lambda: [{"rollout_id": "a"}])
    directory.begin("repair")
    directory.shard("rollouts/repair-00000", lambda: [{"rollout_id": "b"}])
    directory.finish("repair")
    assert RunDirectory(tmp_path).done("repair") == {}
    directory.forget("sample", shards=lambda name: name.startswith("rollouts/base-"))
    directory.shard("rollouts/base-00000", lambda: [{"rollout_id": "c"}])
    assert directory.outdated("repair") and RunDirectory(tmp_path).done("repair") is None
    directory.forget("repair", shards=lambda name: name.startswith("rollouts/repair-"))
    assert (tmp_path / "rollouts" / "repair-00000.parquet.outdated").is_file()
    assert RunDirectory(tmp_path).rollouts("repair").num_rows == 0


# Refusals and errors, in this process


@pytest.fixture
def only_sample(monkeypatch):
    """A first stage that a test gives."""

    def give(stage) -> None:
        monkeypatch.setitem(pipeline.STAGES, "sample", stage)
        monkeypatch.setattr(pipeline, "_tell", lambda run: None)

    return give


def test_a_second_process_is_told_who_is_first(tmp_path, capsys, only_sample):
    only_sample(lambda run: None)
    assert main("sample", TINY, "--out", tmp_path) == 0  # the directory is there
    with lock(tmp_path, "heal run first.yaml", print):
        said = refused(capsys, "sample", TINY, "--out", tmp_path, status=1)
        assert f"process {os.getpid()} on " in said and "heal run first.yaml, since 20" in said
    assert main("sample", TINY, "--out", tmp_path) == 0
    assert "did not come to its end" not in capsys.readouterr().err
    # A process that was killed leaves its name, not its lock.
    holder = {"id": "0", "pid": 7, "host": "elsewhere", "command": "heal run", "since": "1970-01-01"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    assert main("sample", TINY, "--out", tmp_path) == 0
    assert "process 7 on elsewhere, heal run, since 1970-01-01) did not come to its end" in capsys.readouterr().err


def main(*arguments: object) -> int:
    from heal_jax.cli import run

    return run([str(a) for a in arguments])


def test_a_report_during_a_run(tmp_path, only_sample):
    """It writes what the run writes, too; neither is in the other's way."""
    from heal_jax.report.page import write_report

    def sample(run) -> None:
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert main("report", tmp_path) == 0
        write_report(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "report.html"} == before

    only_sample(sample)
    assert main("sample", TINY, "--out", tmp_path) == 0


def test_a_changed_model_is_refused_with_what_differs(tmp_path, capsys, only_sample):
    only_sample(lambda run: None)
    folder = tmp_path / "teacher"
    shutil.copytree(resolve(ModelSpec("builtin:teacher")), folder)
    command = ("sample", TINY, "--out", tmp_path / "out", "--teacher.path", folder)
    assert main(*command) == 0
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": "elsewhere"}))
    said = refused(capsys, *command)
    assert "its teacher" in said and "tokenizer_config.json: " in said and "model.safetensors" not in said


def out_of_memory(run) -> None:
    jnp.zeros(1 << 55, jnp.uint8).block_until_ready()


def no_room_on_disk(run) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "base-00000.parquet")


def read_only(run) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "base-00000.parquet")


def no_memory_on_the_host(run) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "stage, says",
    [
        (out_of_memory, ["sample: out of memory", "sample.batch", "sample.cache_tokens", "mesh.tensor", "--out"]),
        (no_memory_on_the_host, ["sample: out of memory", "sample.batch"]),
        (no_room_on_disk, ["No space left on device", "base-00000.parquet", "make room"]),
        (read_only, ["Read-only file system", "base-00000.parquet"]),
    ],
)
def test_what_a_stage_may_run_out_of(tmp_path, capsys, only_sample, stage, says):
    only_sample(stage)
    said = refused(capsys, "sample", TINY, "--out", tmp_path, "--quiet", status=1)
    assert all(text in said for text in says), said


def test_every_stage_names_its_knobs(tmp_path):
    from heal_jax.config import Config, load
    from heal_jax.errors import RunError
    from heal_jax.strict import flatten, to_dict

    fields = flatten(to_dict(Config()))
    for stage in STAGES:
        with pytest.raises(RunError, match=f"{stage}: out of memory") as error, pipeline.memory(stage):
            raise MemoryError
        named = [word.strip(",;:()") for word in str(error.value).split() if "." in word.strip(",;:().")]
        assert len(named) >= 2 and set(named) <= set(fields), named
        for field, value in re.findall(r"(\S+\.\S+): (\w+)", pipeline.KNOBS.get(stage, "")):
            part, name = field.split(".")
            (tmp_path / "advised.yaml").write_text(f"{part}: {{{name}: {value}}}")
            load(tmp_path / "advised.yaml")


def test_a_directory_that_may_not_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    assert "may write); give another --out" in refused(capsys, "run", TINY, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_until_a_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_tell", lambda run: None)
    for name in STAGES:
        monkeypatch.setitem(pipeline.STAGES, name, lambda run, name=name: run.directory.finish(name))
    assert main("run", TINY, "--out", tmp_path, "--until", "curate") == 0
    assert list(RunDirectory(tmp_path).manifest["stages"]) == list(STAGES[:4])
    assert "until" in refused(capsys, "run", TINY, "--out", tmp_path, "--until", "curation")


# Training


def test_checkpoints_need_no_clock(tmp_path, uninterrupted, monkeypatch):
    """Time that goes backwards, from the machine's clock to the files' times."""
    now = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    with pytest.raises(training.Stop):
        training.run(tmp_path, training.stop_at(20), checkpoint_seconds=1e-9)
    for path in tmp_path.rglob("*"):
        os.utime(path, (FUTURE, FUTURE))
    assert training.same_bits(training.run(tmp_path), uninterrupted[1])


uninterrupted = training.uninterrupted


@pytest.mark.parametrize("one_first", [True, False])
def test_training_goes_on_at_another_mesh(tmp_path, monkeypatch, one_first):
    """One device, then eight, or the other way: the same batches in the same order, losses within 1e-4."""
    batches: list[np.ndarray] = []
    step, spec = loop.train_step, dataclasses.replace(training.SPEC, log_every=1)

    def recorded(graph, transform, params, opt_state, batch, *more):
        batches.append(np.asarray(batch.tokens))
        return step(graph, transform, params, opt_state, batch, *more)

    monkeypatch.setattr(loop, "train_step", recorded)
    meshes = [None, make_mesh({"data": 4, "tensor": 2})]
    whole: list[dict[str, Any]] = []
    training.run(tmp_path / "whole", whole.append, spec=spec)
    alone, batches[:] = [*batches], []
    lines: list[dict[str, Any]] = []
    first, second = meshes if one_first else meshes[::-1]
    with pytest.raises(training.Stop):
        training.run(tmp_path / "moved", training.stop_at(14), mesh=first, spec=spec)
    done = len(batches)
    training.run(tmp_path / "moved", lines.append, mesh=second, spec=spec)
    assert done == 14 and len(batches) - done == 13  # from the checkpoint after step 9
    for a, b in zip(alone, [*batches[:9], *batches[done:]], strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in lines] == list(range(10, 23))
    np.testing.assert_allclose([x["loss"] for x in lines], [x["loss"] for x in whole[9:]], atol=1e-4)
