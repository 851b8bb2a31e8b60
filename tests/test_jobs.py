"""Work of several processes: values, errors, deaths, processors, and the end of the parent."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, refused
from rich.console import Console

from heal_jax import signals
from heal_jax.ablate import jobs
from heal_jax.errors import InputError, RunError
from heal_jax.processors import threads, usable
from heal_jax.progress import Progress


def where(waited, progress):
    time.sleep(waited)
    return os.getpid(), usable()


def wrong(kind, progress):
    raise kind("x: not so")


def says(line, progress):
    progress.say(line)


def saves(path, progress):
    """Told to end, as a training is that saves a checkpoint."""
    path.write_text("begun")
    try:
        time.sleep(600)
    except signals.Stopped:
        path.write_text("saved")
        raise


def dies(status, progress):
    os._exit(status)


def lives(pid: int) -> bool:
    """A child of nobody may stay a zombie, where process 1 is no init."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_children_share_the_processors_and_work_at_the_same_time():
    with jobs.opened(2, Progress(quiet=True)) as submit:
        made = [future.result(60) for future in [submit(where, 1.0) for _ in range(4)]]
    pids = {pid for pid, _ in made}
    assert len(pids) == 2 and os.getpid() not in pids
    shares = {pid: set(share) for pid, share in made}
    if len(usable()) > 1:
        assert set.union(*shares.values()) == set(usable()) and not set.intersection(*shares.values())
    assert not any(map(lives, pids))


def test_one_job_is_here():
    with jobs.opened(1, Progress(quiet=True)) as submit:
        assert submit(where, 0).result()[0] == os.getpid()
        with pytest.raises(InputError, match="not so"):
            submit(wrong, InputError)


def test_errors_are_those_of_the_work(capfd):
    with jobs.opened(2, Progress(quiet=True)) as submit:
        for kind in (InputError, RunError, OSError):
            with pytest.raises(kind, match="^x: not so$"):
                submit(wrong, kind).result(60)
        with pytest.raises(RunError, match="failed.*not so"):
            submit(wrong, ZeroDivisionError).result(60)
        assert "in wrong" in capfd.readouterr().err  # where it was
        with pytest.raises(RunError, match=r"exit status 3.*fewer --jobs"):
            submit(dies, 3).result(60)
        assert submit(where, 0).result(60)[0] != os.getpid()  # the other one


def test_what_children_say_is_said():
    console = Console(file=io.StringIO())
    with jobs.opened(2, Progress(console)) as submit:
        submit(says, "note: damaged; set aside").result(60)
    assert console.file.getvalue().splitlines() == ["note: damaged; set aside"]


def test_children_that_are_to_end_save_what_they_have(tmp_path):
    path = tmp_path / "state"
    with jobs.opened(2, Progress(quiet=True)) as submit:
        submit(saves, path)
        while not path.is_file() or not path.read_text():
            time.sleep(0.05)
    assert path.read_text() == "saved"


@pytest.mark.parametrize("given", ["two", "0", "-1", "1.5"])
def test_threads_that_make_no_sense(monkeypatch, capsys, tmp_path, given):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("NPROC", "3")
    assert threads() == 3
    monkeypatch.setenv("PJRT_NPROC", "2")  # XLA asks for this one first
    assert threads() == 2
    monkeypatch.setenv("PJRT_NPROC", given)
    said = refused(capsys, "ablate", TINY, "--out", tmp_path / "out", "--jobs", "2")
    assert f"PJRT_NPROC={given}: a number of threads" in said and not (tmp_path / "out").exists()


def test_children_end_with_a_parent_that_is_killed():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import test_jobs, os\n"
        "with test_jobs.jobs.opened(2, test_jobs.Progress(quiet=True)) as submit:\n"
        "    pids = {submit(test_jobs.where, 1.0) for _ in range(2)}\n"
        "    print(*{future.result()[0] for future in pids}, flush=True)\n"
        "    submit(test_jobs.where, 600.0)\n"
        "    submit(test_jobs.where, 600.0).result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    for pid in children:
        for _ in range(600):
            if not lives(pid):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{pid} lives on")
