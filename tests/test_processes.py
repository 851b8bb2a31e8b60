"""Several processes on this machine: the same run, and an end in one line when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from compare import EIGHT, SETTINGS, environment, mesh_arguments, same_rollouts, same_run
from conftest import COMMAND, ENVIRONMENT, TINY
from safetensors.numpy import load_file

from heal_jax.world import model_folder

LAUNCHER = Path(__file__).parents[1] / "launch" / "local_processes.sh"
PATIENCE = 180  # seconds within which the others have ended; usually 3, and 60 where the runtime waits for heartbeats
GONE = "heal: another process of this run died or cannot be reached"


def launch(count: int, out: Path, *more: str) -> subprocess.Popen:
    """All processes through the launcher, with `more` settings; eight devices in all."""
    arguments = list(map(str, [LAUNCHER, count, TINY, out, *SETTINGS, *mesh_arguments(**EIGHT), *more]))
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment(8 // count), stdout=pipe, stderr=pipe, text=True)


def by_hand(count: int, out: Path) -> list[subprocess.Popen]:
    """Each process on its own, as on several machines."""
    arguments = [*COMMAND, "run", TINY, "--out", out, *SETTINGS, *mesh_arguments(**EIGHT)]
    return start(count, free_address(), list(map(str, arguments)))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(count: int, address: str, arguments: list[str], /, **differently) -> list[subprocess.Popen]:
    """The processes of one job, each with `arguments` and its share of eight devices; differently: another list of
    `arguments`, number of `devices` or file for `stderr` for each.
    """
    pipe, running = subprocess.PIPE, []
    for i in range(count):
        place = {"HEAL_COORDINATOR": address, "HEAL_PROCESSES": str(count), "HEAL_PROCESS_ID": str(i)}
        own = {"arguments": arguments, "devices": 8 // count, "stderr": pipe} | {
            k: v[i] for k, v in differently.items()
        }
        env = environment(own["devices"], **place)
        running.append(subprocess.Popen(own["arguments"], env=env, stdout=pipe, stderr=own["stderr"], text=True))
    return running


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def shards(out: Path) -> int:
    path = out / "manifest.json"
    return len(json.loads(path.read_text())["shards"]) if path.is_file() else 0


def together(count: int, out: Path) -> Path:
    process = launch(count, out)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert stdout.count("HEAL minus rejection sampling") == 1 and "Gloo" not in stdout + stderr
    assert stderr.count("curate ") == 1  # one process speaks
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An uninterrupted run by two processes with four devices each."""
    return together(2, tmp_path_factory.mktemp("processes") / "two")


def test_any_number_of_processes_gives_the_same_run(on_eight, two, teacher, tmp_path):
    """Two of them all of it; four, which take long to compile on few processors, the rollouts."""
    assert same_run(teacher, on_eight, two) <= 5
    four = tmp_path / "four"
    process = launch(4, four, "--until", "repair")
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert same_rollouts(teacher, on_eight, four) <= 5
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (on_eight, two, four)]
    assert [m["processes"] for m in manifests] == [1, 2, 4]
    assert [m["device"]["count"] for m in manifests] == [8, 8, 8]


def content(out: Path) -> dict:
    """Tables in order and weights."""
    tables = {path.name: pq.read_table(path).to_pylist() for path in sorted(out.rglob("*.parquet"))}
    return {"tables": json.dumps(tables, sort_keys=True), "weights": load_file(out / "export" / "model.safetensors")}


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(two, tmp_path):
    out = tmp_path / "killed"
    # The second dies while they sample.
    first, second = by_hand(2, out)
    wait_for(lambda: shards(out) >= 1, [first, second])
    second.kill()
    _, said = first.communicate(timeout=PATIENCE)
    assert first.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith(GONE) and "\n" not in last and "Traceback" not in said and "***" not in said
    second.communicate()

    # The first, which coordinates, dies while they train; a shard that no manifest knows is made again.
    made = {path: path.stat().st_mtime_ns for path in out.rglob("rollouts/*.parquet")}
    manifest = json.loads((out / "manifest.json").read_text())
    first, second = by_hand(2, out)
    wait_for(lambda: (out / "metrics.jsonl").is_file(), [first, second])
    first.kill()
    _, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 1
    assert said.strip().splitlines()[-1].startswith(GONE) and "Traceback" not in said and "***" not in said
    first.communicate()
    for name in manifest["shards"]:
        path = out / f"{name}.parquet"
        assert path.stat().st_mtime_ns == made[path]

    # With the launcher: it says who ended how, ends the others, and has the status.
    process = launch(2, out)
    wait_for(lambda: (out / "evaluation" / "teacher-00000.parquet").is_file(), [process])
    victims = children(process.pid)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 137 and "process 1 of 2 ended with status 137" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)

    together(2, out)
    found, wanted = content(out), content(two)
    assert found["tables"] == wanted["tables"]
    for name, weight in wanted["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], weight, err_msg=name)


IDLE = """
import os, signal, time
from heal_jax import processes
with processes.job():
    if processes.primary():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
"""


def test_the_runtime_that_aborts_says_one_line_too(tmp_path, monkeypatch):
    """Where no collective fails, since none is under way, JAX aborts: its stack dump is in a file."""
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    first, second = start(2, free_address(), [sys.executable, "-c", IDLE])
    first.communicate(timeout=PATIENCE)
    stdout, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 1 and not stdout and said.startswith(GONE) and said.count("\n") == 1
    (details,) = tmp_path.glob("heal-*.log")
    assert str(details) in said and "Check failure stack trace" in details.read_text()


def children(pid: int) -> list[int]:
    """The processes that another one started, in order."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, found))


SPLIT = """
import shutil, sys
from pathlib import Path
import numpy as np
from heal_jax import processes
from heal_jax.config import ModelSpec, TrainSpec
from heal_jax.export import save
from heal_jax.model.lm import open_model
from heal_jax.model.mesh import make_mesh
from heal_jax.train.data import Example
from heal_jax.train.loop import Phase, train

with processes.job():
    out, mesh = Path(sys.argv[1]), make_mesh({"fsdp": 4, "tensor": 2})
    lm = open_model(ModelSpec("builtin:teacher"), mesh)
    kernel = lm.model.params["blocks"][0]["q"]["kernel"][...]
    assert processes.count() == 1 or not kernel.is_fully_addressable
    assert sum(s.data.size for s in kernel.addressable_shards) == kernel.size // processes.count()
    save(lm, out / "untouched")
    examples = [Example(f"e{i}", "p", "base", tuple(range(i + 3, i + 40)), 8) for i in range(8)]
    phases = [Phase("first", examples, 3), Phase("second", examples, 3)]

    def trained(name):
        done = train(lm.model, phases, TrainSpec(steps=6, batch=8), length=64, pad_id=0, seed=0, folder=out / name,
                     checkpoint_seconds=1e9, mesh=mesh, log=lambda metrics: None)
        return lm.with_params(done.model)

    for _ in range(2):  # the second time from its checkpoint
        save(trained("checkpoints"), out / "trained")
    if processes.count() == 2:  # from the middle of what one process trained
        processes.once(lambda: shutil.copytree(out.parent / "1" / "checkpoints" / "3", out / "moved" / "3") and None)
        save(trained("moved"), out / "resumed")
processes.leave(0)
"""


def test_weights_split_over_processes(tmp_path):
    """Load, train, checkpoint, restore and export with no process holding a whole matrix; two go on from the
    checkpoint of one.
    """
    found = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        running = start(count, free_address(), [sys.executable, "-c", SPLIT, str(out)])
        for process in running:
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said
        found[count] = [load_file(out / name / "model.safetensors") for name in ("untouched", "trained")]
    source = load_file(model_folder("teacher") / "model.safetensors")
    found["resumed"] = [found[2][0], load_file(out / "resumed" / "model.safetensors")]
    for untouched, trained in found.values():
        assert set(untouched) == set(trained) == set(source)
        for name, weight in source.items():
            np.testing.assert_array_equal(untouched[name], weight)
            np.testing.assert_allclose(trained[name], found[1][1][name], atol=1e-4, err_msg=name)
        assert not np.array_equal(trained["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "environ, says",
    [
        ({"HEAL_COORDINATOR": "127.0.0.1:1"}, "HEAL_PROCESSES: a number is expected"),
        ({"HEAL_COORDINATOR": "127.0.0.1:1", "HEAL_PROCESSES": "2", "HEAL_PROCESS_ID": "2"}, "0 to one less"),
        ({"HEAL_COORDINATOR": "127.0.0.1", "HEAL_PROCESSES": "2", "HEAL_PROCESS_ID": "0"}, "HOST:PORT"),
        ({"HEAL_COORDINATOR": "127.0.0.1:99999", "HEAL_PROCESSES": "2", "HEAL_PROCESS_ID": "0"}, "HOST:PORT"),
        ({"HEAL_COORDINATOR": "127.0.0.1:1", "HEAL_PROCESSES": "9" * 20}, "HEAL_PROCESSES: a number is expected"),
        ({"HEAL_PROCESS_ID": "0"}, "HEAL_COORDINATOR is not"),
    ],
)
def test_an_environment_that_makes_no_sense(tmp_path, environ, says):
    command = [*COMMAND, "run", str(TINY), "--out", str(tmp_path / "out")]
    process = subprocess.run(command, env=environment(1, **environ), capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and says in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def ends(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The status of each process and the last thing that it said."""
    said = [process.communicate(timeout=PATIENCE)[1].strip() for process in running]
    assert not any("Traceback" in text for text in said), said
    return [(process.returncode, text.splitlines()[-1]) for process, text in zip(running, said)]


@pytest.mark.parametrize("field, words", [("--seed", "config"), ("--out", "on a file system that all share")])
def test_processes_that_are_not_of_one_run(tmp_path, field, words):
    """Of another seed, or with a folder of its own: all are refused."""
    each = []
    for i in range(2):
        given = {"--seed": "0", "--out": str(tmp_path / "out")} | {
            field: str(i if field == "--seed" else tmp_path / f"{i}")
        }
        arguments = [*COMMAND, "sample", TINY, *SETTINGS, *mesh_arguments(**EIGHT), *sum(given.items(), ())]
        each.append(list(map(str, arguments)))
    for status, said in ends(start(2, free_address(), [], arguments=each)):
        assert status == 2 and said.startswith("heal: the processes of this run differ in") and words in said
    assert not list(tmp_path.rglob("*.parquet"))


def test_processes_with_unequal_devices(tmp_path):
    arguments = [*COMMAND, "sample", str(TINY), "--out", str(tmp_path / "out")]
    for i, (status, said) in enumerate(ends(start(2, free_address(), arguments, devices=[1, 2]))):
        assert status == 2 and f"has {i + 1} of 3 devices" in said


AS_HEAL = """
import sys
import heal_jax.cli as cli
from heal_jax import processes
from heal_jax.errors import InputError, RunError

def command(argv, progress):
    import jax
    with processes.job():
        me = jax.process_index()
        do(me)
    return 0

cli._dispatch = command
"""
TOLD = """
def do(me):
    def fail():
        raise {error}
    processes.once(lambda: None)
    processes.once(fail, by=1)
cli.main()
"""


@pytest.mark.parametrize(
    "error, statuses, says",
    [
        ("OSError(28, 'No space left on device', 'shard')", (1, 1), "No space left on device"),
        ("RunError('gloomy barrier')", (1, 1), "heal: gloomy barrier"),
        ("InputError('not so')", (2, 2), "heal: not so"),
    ],
)
def test_what_fails_in_one_process_is_said_by_all(error, statuses, says):
    code = AS_HEAL + TOLD.format(error=error)
    found = ends(start(2, free_address(), [sys.executable, "-c", code]))
    assert tuple(status for status, _ in found) == statuses and all(says in said for _, said in found)


def test_an_error_that_cannot_be_said_ends_the_job(tmp_path):
    """stderr on a full disk."""
    code = AS_HEAL + "def do(me):\n    if me: raise RunError('x')\n    processes.once(lambda: 1, by=1)\ncli.main()\n"
    with open("/dev/full", "w") as full:
        running = start(2, free_address(), [sys.executable, "-c", code], stderr=[subprocess.PIPE, full])
        _, said = running[0].communicate(timeout=PATIENCE)
        running[1].communicate(timeout=PATIENCE)
    assert [process.returncode for process in running] == [1, 1] and said.strip().splitlines()[-1].startswith(GONE)


UNWRITABLE = """
def do(me):
    import resource
    from pathlib import Path
    from heal_jax.config import ModelSpec, TrainSpec
    from heal_jax.model.lm import open_model
    from heal_jax.model.mesh import make_mesh
    from heal_jax.train import checkpoint, loop
    from heal_jax.train.data import Example
    checkpoint.WRITE_SECONDS = 5
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    lm = open_model(ModelSpec("builtin:teacher"), mesh)
    if me:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    examples = [Example(f"e{i}", "p", "base", tuple(range(i + 3, i + 40)), 8) for i in range(8)]
    loop.train(lm.model, [loop.Phase("all", examples, 2)], TrainSpec(steps=2, batch=8), length=64, pad_id=0, seed=0,
               folder=Path(sys.argv[1]), checkpoint_seconds=1e9, mesh=mesh, log=lambda metrics: None)
cli.main()
"""


def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path):
    command = [sys.executable, "-c", AS_HEAL + UNWRITABLE, str(tmp_path / "checkpoints")]
    running = start(2, free_address(), command)
    said = [process.communicate(timeout=PATIENCE)[1] for process in running]  # Orbax logs at length, too
    assert [process.returncode for process in running] == [1, 1], said
    assert all("\nheal: " in text for text in said) and "a checkpoint cannot be written" in said[1], said


PREEMPTED = """
def do(me):
    from pathlib import Path
    from heal_jax.config import ModelSpec, TrainSpec
    from heal_jax.model.lm import open_model
    from heal_jax.model.mesh import make_mesh
    from heal_jax.train import loop
    from heal_jax.train.data import Example
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    lm = open_model(ModelSpec("builtin:teacher"), mesh)
    examples = [Example(f"e{i}", "p", "base", tuple(range(i + 3, i + 40)), 8) for i in range(8)]
    loop.train(lm.model, [loop.Phase("all", examples, 10**6)], TrainSpec(steps=10**6, batch=8, log_every=1), length=64,
               pad_id=0, seed=0, folder=Path(sys.argv[1]), checkpoint_seconds=1e9, mesh=mesh,
               log=lambda metrics: print("step", flush=True))
cli.main()
"""


def test_processes_that_are_told_to_end_save_together(tmp_path):
    """SIGTERM to all, as before a machine is taken away: a whole checkpoint, and status 143 of each."""
    running = start(2, free_address(), [sys.executable, "-c", AS_HEAL + PREEMPTED, str(tmp_path / "checkpoints")])
    for process in running:
        assert process.stdout.readline() == "step\n"
    for process in running:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=PATIENCE)[1] for process in running]
    assert [process.returncode for process in running] == [143, 143], said
    assert all(text.strip().splitlines()[-1].startswith("heal: terminated") for text in said), said
    assert [path.name for path in (tmp_path / "checkpoints").glob("*/sha256.json")] == ["sha256.json"]


APART = """
def do(me):
    from pathlib import Path
    import heal_jax
    lm = heal_jax.load("builtin:student")  # each on its own device
    text = lm.generate([f"{me} + 1 ="], n=1, max_new_tokens=4)[0][0]
    assert tuple(text.prompt_tokens) == tuple(lm.tokenizer.prompt(f"{me} + 1 ="))
    heal_jax.save(lm, Path(sys.argv[1]))
cli.main()
"""


def test_a_model_that_each_process_has_for_itself(tmp_path):
    command = [sys.executable, "-c", AS_HEAL + APART, str(tmp_path / "model")]
    for process in start(2, free_address(), command):
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "model", model_folder("student")))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_bad_input_ends_all_alike(tmp_path):
    """Every process says the same, with status 2, and nothing is written."""
    process = launch(2, tmp_path / "out", "--mesh.tensor", "3")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2 and "mesh data=8 tensor=3 needs 24 devices, there are 8; nearest: data=8" in said
    assert not (tmp_path / "out").exists()
