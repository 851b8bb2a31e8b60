"""The compilation cache of the `heal` command, and how many programs a run compiles."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
from conftest import ENVIRONMENT, TINY

from heal_jax import cache
from heal_jax.cli import run as heal

# README, "Commands". Roll-outs of five shapes, scoring of two and training are ours to keep few; the rest is small.
PROGRAMS = 18

COUNTED = """
import json, sys
import jax
from heal_jax.cli import run
compiled, events = [], []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: compiled.append(more.get("fun_name")) if "backend_compile" in event else None
)
jax.monitoring.register_event_listener(lambda event, **more: events.append(event))
status = run(sys.argv[1:])
hits = sum(event == "/jax/compilation_cache/cache_hits" for event in events)
print(json.dumps([status, compiled, hits]))
"""


def counted(*arguments: object, **environment: str) -> tuple[list[str], int, str]:
    """Programs that a command compiles or reads, how many of them it reads, and what it says."""
    command = [sys.executable, "-c", COUNTED, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=900)
    status, compiled, hits = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return compiled, hits, done.stderr


def test_a_run_compiles_few_programs_and_its_cache_changes_nothing(tmp_path, tiny, caches):
    """A whole run that finds what the fixture's, of the same config, left in the cache: same bytes."""
    before, out = tiny[0], tmp_path / "out"
    compiled, hits, said = counted("run", TINY, "--out", out, "--quiet")
    assert len(compiled) <= PROGRAMS, compiled
    assert hits >= 8, compiled  # the large ones
    assert not said.strip()
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (before, out)]
    assert weights[0] == weights[1]
    tables = [pq.read_table(folder / "rollouts" / "base-00000.parquet").to_pylist() for folder in (before, out)]
    assert tables[0] == tables[1]
    for folder in (caches / "heal_jax", *(caches / "heal_jax").iterdir()):
        assert folder.stat().st_mode & 0o777 == 0o700


def enabled(folder, monkeypatch, **environment: str) -> tuple[dict, list[str]]:
    """What `enable` sets and says, with `folder` as the user's cache directory."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in ({"XDG_CACHE_HOME": str(folder)} | environment).items():
        monkeypatch.setenv(name, value)
    found, said = {}, []
    monkeypatch.setattr(cache.jax.config, "update", found.__setitem__)
    cache.enable(said.append)
    return found, said


def test_the_folder_is_the_users_alone(tmp_path, monkeypatch):
    found, said = enabled(tmp_path, monkeypatch)
    path = tmp_path / "heal_jax"
    assert not said and found["jax_compilation_cache_dir"].startswith(str(path))
    path.chmod(0o770)
    found, said = enabled(tmp_path, monkeypatch)
    assert not found and "others may write" in said[0] and len(said) == 1
    path.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    found, said = enabled(tmp_path, monkeypatch)
    assert not found and "others may write" in said[0]


def test_where_no_folder_can_be_made_there_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    found, said = enabled(tmp_path / "file", monkeypatch)
    assert not found and "no compilation cache" in said[0] and "\n" not in said[0]


def test_other_folders_are_the_users_affair_and_off_is_off(tmp_path, monkeypatch, capsys):
    found, said = enabled(tmp_path, monkeypatch, HEAL_COMPILATION_CACHE="off")
    assert found == {"jax_enable_compilation_cache": False} and not said
    monkeypatch.setenv("HEAL_COMPILATION_CACHE", "no")
    assert heal(["run", str(TINY), "--out", str(tmp_path / "out")]) == 2
    assert "on or off is expected" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv("HEAL_COMPILATION_CACHE", "on")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    cache.enable(said.append)
    assert not said and not (tmp_path / "heal_jax").exists()


# A program that is slow enough to be kept, compiled with the command's cache.
ONE = """
import sys
import jax, jax.numpy as jnp
from heal_jax import cache
cache.enable(lambda text: print(text, file=sys.stderr))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **more: hits.append(event) if "cache_hits" in event else None)
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))(jnp.ones((64, 64)))), len(hits))
"""


def one(folder, limit: str = "") -> tuple[list[str], str]:
    """The value, the number of programs read, and what is said; `limit`: shell commands before."""
    command = ["bash", "-c", f'{limit} exec "$0" -c "$1"', sys.executable, ONE]
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_a_torn_entry_is_written_again(tmp_path):
    value, _ = one(tmp_path)[0]
    entries = sorted(tmp_path.glob("heal_jax/*/*-cache"))
    whole = [entry.read_bytes() for entry in entries]
    # As a process leaves it that is killed while it writes.
    entries[0].write_bytes(whole[0][:100])
    entries[0].with_name(entries[0].name.removesuffix("-cache") + "-atime").unlink()
    (again, hits), said = one(tmp_path)
    assert again == value and int(hits) == len(entries) - 1 and not said
    assert entries[0].stat().st_size == len(whole[0])
    assert int(one(tmp_path)[0][1]) == len(entries)


def test_a_full_disk_costs_the_cache_alone(tmp_path):
    (value, hits), said = one(tmp_path, "ulimit -f 0; trap '' XFSZ;")
    assert not said and hits == "0" and value == one(tmp_path)[0][0]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "heal_jax").write_text("a file in its place")
    (value, hits), said = one(tmp_path)
    assert np.isfinite(float(value)) and hits == "0" and "no compilation cache" in said


def test_processes_that_compile_at_the_same_time_share_it(tmp_path):
    command = [sys.executable, "-c", ONE]
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path)}
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300) for process in running]
    assert len({out.split()[0] for out, _ in said}) == 1 and not any(err for _, err in said)
    assert int(one(tmp_path)[0][1]) == len(list(tmp_path.glob("heal_jax/*/*-cache")))
