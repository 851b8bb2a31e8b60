"""Several processes that do one run together, over `jax.distributed`: joining, sharing, leaving.

They form one mesh and compute every batch together, each giving the same inputs. Files belong to one of them: a rollout
shard to the process that its number falls to, all else to the first. A process whose peer dies ends with one line.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from heal_jax.errors import InputError, RunError

JOIN_SECONDS = 120  # until all processes are there
HEARTBEAT_SECONDS = 60  # of silence, after which a process counts as dead; a closed connection tells at once
LEAVE_SECONDS = 3  # a process that fails stays this long, so that others that fail alike can say so themselves

# What collectives, barriers and the coordination service say when a process is gone.
_PEER_IS_GONE = re.compile(r"gloo|coordination|heartbeat|barrier|connection (closed|reset)|unavailable", re.IGNORECASE)
_GONE = "another process of this run died or cannot be reached; start all again: they go on where they stopped"
_speaking = threading.Lock()  # held by whoever says how this process ends


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Join the job, where the environment names one; inside, the error of a dead peer is a RunError."""
    join()
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            if not _speaking.acquire(blocking=False):
                time.sleep(2 * LEAVE_SECONDS)  # the runtime has given up, too, and ends this process
            if isinstance(error, Exception) and not isinstance(error, InputError) and _PEER_IS_GONE.search(str(error)):
                raise RunError(_GONE) from error
        raise


def join() -> None:
    """Become one of the processes of a job, where the environment names one. To be called before JAX is used.

    HEAL_COORDINATOR=HOST:PORT (of process 0), HEAL_PROCESSES=N and HEAL_PROCESS_ID=I; or HEAL_COORDINATOR=auto, where
    JAX finds all three itself (TPU pods, Slurm, Open MPI). Raises InputError for values that make no sense, RunError
    where the others do not come.
    """
    coordinator = os.environ.get("HEAL_COORDINATOR")
    if not coordinator:
        return
    arguments: dict[str, Any] = {}
    if coordinator != "auto":
        count, index = (_number(name) for name in ("HEAL_PROCESSES", "HEAL_PROCESS_ID"))
        if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= index < count:
            raise InputError(
                f"HEAL_COORDINATOR={coordinator} HEAL_PROCESSES={count} HEAL_PROCESS_ID={index}: "
                "HOST:PORT (or auto), the number of processes, and 0 to one less are expected"
            )
        arguments = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would make SIGTERM do nothing
    _end_in_one_line()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{coordinator}: the processes did not find each other ({error})") from None


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise InputError(f"{name}: a number is expected beside HEAL_COORDINATOR, not {value!r}")
    return int(value)


def leave(status: int) -> None:
    """End this process's part in the job. After an error it does not return: an orderly end would wait for the others.

    The process must have said what the error is.
    """
    if not jax.distributed.is_initialized():
        return
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(LEAVE_SECONDS)
        os._exit(status)
    jax.distributed.shutdown()


def count() -> int:
    return jax.process_count()


def primary() -> bool:
    """Whether this process writes what belongs to the run as a whole, and speaks."""
    return jax.process_index() == 0


def once(function: Callable[[], Any], by: int = 0) -> Any:
    """What `function` returns in one process, given to all: JSON data. All wait until it is there."""
    if count() == 1:
        return function()
    mine = by == jax.process_index()
    data = np.frombuffer(json.dumps(function() if mine else None).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), mine))
    buffer = np.zeros(1 << max(8, (length - 1).bit_length()), np.uint8)  # few sizes, so few compilations
    if mine:
        buffer[:length] = data
    return json.loads(multihost_utils.broadcast_one_to_all(buffer, mine)[:length].tobytes())


def agree(check: Callable[[], object]) -> None:
    """Run a check in the first process alone; its InputError is raised in all."""

    def said() -> str:
        try:
            check()
        except InputError as error:
            return str(error)
        return ""

    if fault := once(said):
        raise InputError(fault)


def fetch(tree: Any) -> Any:
    """Device arrays to NumPy, whole, in every process, wherever their shards lie."""
    return jax.device_get(tree) if count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


_kept: list[Any] = []  # what C code holds pointers to


def _end_in_one_line() -> None:
    """Where the runtime finds a peer dead it aborts with a stack dump: have that in a file, here a line and status 1.

    From now on Python's stdout and stderr are copies of what they were, and what C++ code writes there is for the file.
    """
    notices = tempfile.TemporaryFile()  # noqa: SIM115 (open to the end)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    for number in (1, 2):
        os.dup2(notices.fileno(), number)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        if not _speaking.acquire(blocking=False):
            time.sleep(2 * LEAVE_SECONDS)  # the main thread is about to exit
        try:
            said = os.pread(notices.fileno(), 1 << 20, 0)
            reason = _GONE if b"distributed service detected" in said else "the runtime aborted"
            with tempfile.NamedTemporaryFile(prefix="heal-", suffix=".log", delete=False) as file:
                file.write(said)
            os.write(sys.stderr.fileno(), f"heal: {reason} (details: {file.name})\n".encode())
        finally:
            os._exit(1)

    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    _kept.extend([aborted, notices])
