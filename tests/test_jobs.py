"""Work of several processes: values, errors, deaths, processors, and the end of the parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heal_jax.ablate import jobs
from heal_jax.errors import InputError, RunError
from heal_jax.processors import usable
from heal_jax.progress import Progress


def where(waited, progress):
    time.sleep(waited)
    return os.getpid(), usable()


def wrong(kind, progress):
    raise kind("x: not so")


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
