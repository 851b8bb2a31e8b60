"""Runs on a bucket: a store of objects without renames and appends (object_store.py) in place of Google's."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, TINY, refused
from conftest import start as started
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store import serving
from test_processes import free_address, start

from heal_jax import lock, storage
from heal_jax.bench.faults import content
from heal_jax.errors import InputError, RunError
from heal_jax.store import RunDirectory, write_text
from heal_jax.train import checkpoint

URL = "gs://bucket/runs/one"


@pytest.fixture(scope="module")
def server():
    """The store, for this process and for those that it starts."""
    with serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
            patch.setitem(ENVIRONMENT, name, value)
        yield store


@pytest.fixture
def store(server):
    """The store, empty."""
    server.objects.clear()
    server.room = float("inf")
    return server


# The working copy

FILES = ("metrics.jsonl", "manifest.json", "a", "b/c.parquet", "b/d/e", "curriculum/stage1/f")
ACTIONS = st.lists(
    st.tuples(st.sampled_from(("write", "append", "remove", "rename", "push")), st.sampled_from(FILES)), max_size=12
)


@given(ACTIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_objects_are_the_files(store, actions):
    """Whatever is done to the files, after a push the objects are the same, and so is a working copy elsewhere."""
    store.objects.clear()
    with storage.opened(Path(URL)) as folder:
        for count, (action, name) in enumerate(actions):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if action == "push":
                storage.push(path)
            elif action == "write":
                write_text(path, f"{name} {count}")
            elif action == "append":
                with open(path, "a") as file:
                    file.write(str(count))
            elif path.is_file():
                path.unlink() if action == "remove" else path.rename(path.with_name(f"{path.name}.outdated"))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name.removeprefix("runs/one/"): store.read(name) for name in store.names()} == files
    assert not folder.exists()
    with storage.opened(Path(URL), write=False) as folder:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: data for name, data in files.items() if not name.endswith(".outdated")}


def test_cut_off_after_any_write_nothing_finished_is_lost(store):
    """The store takes so many writes and no more, as if the process had been killed then."""

    def work(folder: Path) -> None:
        directory = RunDirectory(folder)
        again = directory.verify(lambda line: None)
        assert not again
        for number in range(3):
            directory.shard(f"rollouts/base-0000{number}", lambda n=number: [{"rollout_id": str(n)}])
        if directory.done("sample") is None:
            write_text(folder / "problems.parquet", "problems")
            directory.finish("sample", [folder / "problems.parquet"])

    def attempt() -> None:
        with storage.opened(Path(URL)) as folder:
            work(folder)

    attempt()
    whole, writes = {name: store.read(name) for name in store.names()}, 0
    for room in range(2, 100):  # after the probe
        store.objects.clear()
        store.room = room
        with contextlib.suppress(RunError, InputError):
            attempt()
            writes = room
        store.room = float("inf")
        named = [name for name in store.names() if name.endswith("manifest.json")]
        for name, data in store.objects.items():
            assert name not in whole or "manifest" in name or data[0] == whole[name]
        shards = json.loads(store.read(named[0]))["shards"] if named else {}
        assert all(f"runs/one/{shard}.parquet" in store.objects for shard in shards)
        attempt()
        assert {name: store.read(name) for name in store.names()} == whole
        if writes:
            break
    assert 8 < writes < 30  # each of them was the last one once


def test_what_was_changed_on_the_bucket_is_made_again(store):
    for damage in (b"other", None):
        with storage.opened(Path(URL)) as folder:
            directory = RunDirectory(folder)
            directory.shard("rollouts/base-00000", lambda: [{"rollout_id": "a"}])
            (folder / "export").mkdir(exist_ok=True)
            write_text(folder / "export" / "config.json", "weights")
            directory.finish("export", [folder / "export"])
        for name in ("rollouts/base-00000.parquet", "export/config.json"):
            store.remove(f"runs/one/{name}") if damage is None else store.write(f"runs/one/{name}", damage)
        said: list[str] = []
        with storage.opened(Path(URL)) as folder:
            assert not (folder / "export").exists()  # a run does not read it
            assert RunDirectory(folder).verify(said.append) == ["export"]
            assert len(said) == 2 and not RunDirectory(folder).manifest["shards"]
            kept = folder / "rollouts" / "base-00000.parquet.damaged"
            assert not kept.is_file() if damage is None else kept.read_bytes() == damage


def test_names_from_strangers_stay_inside(store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("../out", "/etc/x", "a/../../out", "a//b", ".lock/1", "..", "a\0b", "fine", "a [*]?#"):
        store.write(f"runs/one/{name}", b"x")
    store.write("runs/one2/other", b"x")
    with storage.opened(Path(URL), write=False) as folder:
        assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
            str((folder / name).relative_to(tmp_path)) for name in ("fine", "a [*]?#")
        }


def test_copies_of_killed_processes_are_removed(store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "YOUNG", 0)
    code = "import sys, time\nfrom pathlib import Path\nfrom heal_jax import storage\n"
    code += f"with storage.opened(Path({URL!r}), write=False):\n    print(flush=True)\n    time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, stdout=-1)
    process.stdout.read(1)
    for left in (1, 0):
        with storage.opened(Path(URL), write=False) as folder:
            assert len([path for path in tmp_path.iterdir() if path != folder.parent]) == left
        process.kill()
        process.wait()


def test_checksums_hold_on_either_side(store, tmp_path):
    """A checkpoint that was copied from a bucket to disk, or the other way."""
    with storage.opened(Path(URL)) as folder:
        on_bucket, on_disk = storage.place(folder / "checkpoints" / "1"), tmp_path
        for data in (b"", b"some bytes" * 1000):
            store.write("runs/one/checkpoints/1/state/d", data)
            (on_disk / "state").mkdir(exist_ok=True)
            (on_disk / "state" / "d").write_bytes(data)
            sums = [checkpoint._sums(step)["state/d"] for step in (on_bucket, on_disk)]
            assert len(set(sums)) == 2
            for step in (on_bucket, on_disk):
                for recorded in sums:
                    assert checkpoint._holds(step / "state" / "d", recorded)
                    assert not checkpoint._holds(step / "state" / "d", recorded.replace(recorded[-3], "?"))
                    assert not checkpoint._holds(step / "state" / "e", recorded)


# The lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "STALE", 2.5)


def nothing(line: str) -> None:
    pass


def test_a_second_run_is_told_who_is_first(store, quick):
    with storage.opened(Path(URL)) as one, storage.opened(Path(URL)) as two:
        with lock.lock(one, "heal run first.yaml", nothing):
            assert lock.holder(one) == lock.holder(two) == f"{URL}/.lock/000001"
            with pytest.raises(RunError, match=rf"process {os.getpid()} on .*heal run first.yaml, since 20"):
                lock.lock(two, "heal run second.yaml", nothing).__enter__()
            write_text(one / "a", "x")
        assert store.read("runs/one/a") == b"x" and not store.names("runs/one/.lock")
        with lock.lock(two, "heal run second.yaml", nothing):
            assert (two / "a").read_text() == "x"  # written after this copy was made


def test_of_many_one_has_the_lock(store, quick):
    """Started together on what a killed run left."""
    store.write("runs/one/.lock/000007", b'{"pid": 1, "host": "elsewhere", "command": "", "since": ""}')
    held, told = [], []
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(storage.opened(Path(URL))) for _ in range(4)]
        done = threading.Barrier(4)

        def run(folder: Path) -> None:
            try:
                with lock.lock(folder, str(folder), nothing):
                    held.append(folder)
                    done.wait(60)
            except RunError as error:
                told.append(str(error))
                done.wait(60)

        threads = [threading.Thread(target=run, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(held) == 1 and len(told) == 3 and all(str(held[0]) in line for line in told)


def test_a_silent_run_is_taken_over_and_finds_out(store, quick, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 1e6)
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        two = stack.enter_context(storage.opened(Path(URL)))
        stack.enter_context(pytest.raises(RunError, match="another run took it over"))
        one = stack.enter_context(storage.opened(Path(URL)))
        stack.enter_context(lock.lock(one, "first", nothing))
        with lock.lock(two, "second", said.append):
            write_text(two / "a", "second")
            storage.push(two)
            write_text(one / "a", "first")
            with pytest.raises(RunError, match="another run took it over"):
                storage.push(one)
        storage.push(one)
    assert "waiting up to" in said[0] and "did not come to its end" in said[1]
    assert store.read("runs/one/a") == b"second" and not store.names("runs/one/.lock")


# Refusals, in a line and before anything is made


def test_what_is_refused(store, tmp_path, capsys, monkeypatch):
    run = ("run", TINY, "--out")
    assert "gs://other/run: no such bucket" in refused(capsys, *run, "gs://other/run")
    assert "s3://bucket/run: a run can be on disk or on gs://" in refused(capsys, *run, "s3://bucket/run")
    store.room = 0
    said = refused(capsys, *run, URL)
    assert said.startswith(f"heal: {URL}: cannot be written (") and "gcloud auth" in said
    store.room = 1  # it can be created and not deleted
    assert "create and delete" in refused(capsys, *run, URL)
    store.room = float("inf")
    for command in ("show", "report"):
        assert f"heal: {URL}: not a run directory" in refused(capsys, command, URL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'heal-jax[gcs]'" in refused(capsys, "show", URL)


def test_a_run_on_disk_needs_no_buckets():
    code = "import sys\nimport heal_jax.cli, heal_jax.cache, heal_jax.pipeline, heal_jax.train.checkpoint\n"
    code += "print([name for name in ('gcsfs', 'aiohttp', 'google.cloud.storage') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


CACHED = """
import jax
from heal_jax import cache
cache.enable(print)
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
"""


def test_compiled_programs_on_a_bucket(store):
    where = {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    where |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

    def compiled(**more: str) -> str:
        environment = ENVIRONMENT | where | more
        done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert compiled() == "512.0\n"
    programs = {name: store.objects[name][1]["generation"] for name in store.names("cache/")}
    assert any("jit" in name for name in programs)
    store.reads.clear()
    assert compiled() == "512.0\n"
    assert store.reads >= set(programs)
    assert {name: store.objects[name][1]["generation"] for name in store.names("cache/")} == programs
    said = compiled(JAX_COMPILATION_CACHE_DIR="gs://other/cache")
    assert said.startswith("note: gs://other/cache: no such bucket") and said.endswith("512.0\n")


# Whole runs


def downloaded(store, folder: Path) -> Path:
    for name in store.names("runs/one/"):
        path = folder / name.removeprefix("runs/one/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(name))
    return folder


def test_killed_damaged_and_resumed_elsewhere_gives_the_same_bytes_as_on_disk(store, tiny, tmp_path):
    """Killed while it trains; then a shard and a checkpoint are changed; then it goes on with an empty disk."""
    command = ("run", TINY, "--out", URL, "--quiet")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    first = started(*command, environment=ENVIRONMENT | {"TMPDIR": str(tmp_path / "here")})
    summed = "runs/one/checkpoints/heal/4/sha256.json"
    while summed not in store.objects and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert summed in store.objects and store.names("runs/one/.lock") and "runs/one/summary.json" in store.objects
    for name in ("runs/one/rollouts/base-00001.parquet", max(store.names("runs/one/checkpoints/heal/4/state/d/"))):
        store.write(name, store.read(name)[:-1] + b"?")
    second = started(*command[:-1], environment=ENVIRONMENT | {"TMPDIR": str(tmp_path / "there")})
    stdout, said = second.communicate()
    assert second.returncode == 0, said
    assert f"{URL}/rollouts/base-00001.parquet: damaged" in said and "did not come to its end" in said
    assert f"{URL}/checkpoints/heal/4: damaged" in said and f"goes on from {URL}/checkpoints/heal/2" in said
    assert f"report: {URL}/report.html   student: {URL}/export" in stdout
    assert str(tmp_path) not in said and not list((tmp_path / "there").glob(f"{storage.PREFIX}*"))
    assert not store.names("runs/one/.lock")

    out = downloaded(store, tmp_path / "out")
    (out / "rollouts" / "base-00001.parquet.damaged").unlink()
    assert content(out) == content(tiny[0])
    # It goes on from disk, checkpoints included: the student is restored to be evaluated.
    (out / "evaluation" / "heal-00000.parquet").unlink()
    process = started("run", TINY, "--out", out)
    _, said = process.communicate()
    assert process.returncode == 0 and said.count("done before") == 6 and ": damaged" not in said, said
    assert content(out) == content(tiny[0])


TWO = """
import sys
from pathlib import Path
import numpy as np
from heal_jax import storage, processes
from heal_jax.config import ModelSpec, TrainSpec
from heal_jax.export import save
from heal_jax.model.lm import open_model
from heal_jax.model.mesh import make_mesh
from heal_jax.store import RunDirectory
from heal_jax.train.data import Example, read_stage, write_stage
from heal_jax.train.loop import Phase, train

examples = [Example(f"e{i}", "p", "base", tuple(range(i + 3, i + 40)), 8) for i in range(8)]
phases = [Phase("first", examples, 2), Phase("second", examples, 2)]
with processes.job(), storage.opened(Path(sys.argv[1])) as out:
    directory = RunDirectory(out)
    for number in range(4):  # each process makes two of them and reads all
        made = lambda: [{"rollout_id": f"{number}"}]
        table, new = directory.shard(f"rollouts/base-0000{number}", made, owner=number % processes.count())
        assert table["rollout_id"].to_pylist() == [str(number)] and new == (sys.argv[2] == "first")
    if directory.done("curate") is None:
        stage = out / "curriculum" / "stage1"
        processes.once(lambda: write_stage(stage, 1, examples, {}))
        directory.finish("curate", [out / "curriculum"])
    storage.pull(out / "curriculum")
    assert read_stage(out / "curriculum" / "stage1") == examples
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    lm = open_model(ModelSpec("builtin:teacher"), mesh)
    steps = []
    done = train(lm.model, phases, TrainSpec(steps=4, batch=8, log_every=1), length=64, pad_id=0, seed=0,
                 folder=out / "checkpoints", checkpoint_seconds=1e9, mesh=mesh, log=steps.append)
    assert len(steps) == (4 if sys.argv[2] == "first" else 0)
    save(lm.with_params(done.model), out / "export")
    directory.finish("export", [out / "export"])
processes.leave(0)
"""


def test_processes_that_share_a_bucket_alone(store):
    """Each has a disk of its own. They train, and a second time go on from what is on the bucket."""
    weights = []
    for attempt in ("first", "second"):
        running = start(2, free_address(), [sys.executable, "-c", TWO, URL, attempt])
        for process in running:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
        weights.append(store.read("runs/one/export/model.safetensors"))
        store.remove("runs/one/export/model.safetensors")
    parts = [name.partition("/state/")[2] for name in store.names("runs/one/checkpoints/4/state/ocdbt.process_")]
    assert {part.split("/")[0] for part in parts} == {"ocdbt.process_0", "ocdbt.process_1"}
    assert weights[0] == weights[1]
