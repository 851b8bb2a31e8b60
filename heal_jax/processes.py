"""Several processes that do one run together, over `jax.distributed`: joining, sharing, leaving.

They form one mesh and compute every batch together, each giving the same inputs. Files belong to one of them: a rollout
shard to the process that its number falls to, all else to the first. A process whose peer dies ends with one line.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from heal_jax import signals
from heal_jax.errors import InputError, RunError

JOIN_SECONDS = 300  # until all processes are there: the hosts of a pod start at their own pace
END_SECONDS = 3600  # in which the last of them comes to its end
HEARTBEAT_SECONDS = 60  # of silence, after which a process counts as dead; a closed connection tells at once
LEAVE_SECONDS = 3  # a process that fails stays this long, so that others that fail alike can say so themselves

# What collectives, barriers and the coordination service say when a process is gone.
_PEER_IS_GONE = re.compile(r"gloo|coordination|heartbeat|barrier|connection (closed|reset)|unavailable", re.IGNORECASE)
_GONE = "another process of this run died or cannot be reached; start all again: they go on where they stopped"
_ALONE = (
    f"the processes did not find each other within {JOIN_SECONDS} s; check HEAL_COORDINATOR and that all were started"
)
_joined = threading.Event()
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
            if _peer_is_gone(error):
                raise RunError(_GONE) from error
        raise


def _peer_is_gone(error: BaseException | None) -> bool:
    """Whether this is, or comes from, what JAX says when a process is gone."""
    while error is not None:
        # Orbax says in errors of other kinds what a barrier said; ours, and the system's, mean what they say.
        foreign = isinstance(error, Exception) and not isinstance(error, (InputError, RunError, OSError))
        if foreign and _PEER_IS_GONE.search(str(error)):
            return True
        error = error.__cause__
    return False


def join() -> None:
    """Become one of the processes of a job, where the environment names one. To be called before JAX is used.

    HEAL_COORDINATOR=HOST:PORT (of process 0), HEAL_PROCESSES=N and HEAL_PROCESS_ID=I; or HEAL_COORDINATOR=auto, where
    JAX finds all three itself (TPU VMs, GKE, Slurm, Open MPI). Raises InputError for values that make no sense and for
    processes with different numbers of devices, RunError where the others do not come.
    """
    arguments = named(os.environ)
    if arguments is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would make SIGTERM do nothing
    _end_in_one_line()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
        _joined.set()
        processes, here, devices = jax.process_count(), jax.local_device_count(), jax.device_count()
        if devices != processes * here:
            raise InputError(
                f"this one of {processes} processes has {here} of {devices} devices; give each the same number"
            )
        # gloo gives its first collective half a minute: have it while all are here.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError, OSError) as error:
        advice = "" if arguments else "; auto is for TPU VMs, GKE, Slurm and Open MPI, elsewhere say HOST:PORT"
        coordinator = os.environ["HEAL_COORDINATOR"]
        raise RunError(f"{coordinator}: the processes did not find each other ({error}){advice}") from None


def named(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What the environment says of the job, as `jax.distributed.initialize` takes it; empty for auto, None where there
    is none. Raises InputError for values that make no sense."""
    coordinator = environment.get("HEAL_COORDINATOR")
    if not coordinator:
        if given := [name for name in ("HEAL_PROCESSES", "HEAL_PROCESS_ID") if environment.get(name)]:
            raise InputError(f"{given[0]} is set and HEAL_COORDINATOR is not; set all three, or none")
        return None
    if coordinator == "auto":
        return {}
    count, index = (_number(environment, name) for name in ("HEAL_PROCESSES", "HEAL_PROCESS_ID"))
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if port is None or not 0 < int(port[1]) < 1 << 16 or not 0 <= index < count:
        raise InputError(
            f"HEAL_COORDINATOR={coordinator} HEAL_PROCESSES={count} HEAL_PROCESS_ID={index}: "
            "HOST:PORT (or auto), the number of processes, and 0 to one less are expected"
        )
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,6}", value):
        raise InputError(f"{name}: a number is expected beside HEAL_COORDINATOR, not {value!r}")
    return int(value)


def leave(status: int) -> None:
    """End this process, if it is one of a job. After an error the others are not waited for; what it is must have been
    said. Without one they are, and then it ends at once all the same: on a busy machine the interpreter's own end now
    and then never came, for a thread of the runtime.
    """
    if not jax.distributed.is_initialized():
        return
    orderly = not status
    if orderly:
        try:
            jax.distributed.shutdown()
        except RuntimeError:
            print(f"heal: {_GONE}", file=sys.stderr)
            orderly, status = False, 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        if not orderly:
            time.sleep(LEAVE_SECONDS)
    finally:
        os._exit(status)


def count() -> int:
    return jax.process_count()


def primary() -> bool:
    """Whether this process writes what belongs to the run as a whole, and speaks."""
    return jax.process_index() == 0


def once(function: Callable[[], Any], by: int = 0) -> Any:
    """What `function` returns in one process, given to all: JSON data. All wait until it is there.

    An InputError, RunError or OSError of it is raised in all, in the others an OSError as a RunError.
    """
    if count() == 1:
        return function()
    mine, failed = by == jax.process_index(), None
    answer: dict[str, Any] = {}
    if mine:
        try:
            answer["value"] = function()
        except (InputError, RunError, OSError) as error:
            failed = error
            answer["input" if isinstance(error, InputError) else "run"] = str(error)
    answer = json.loads(_broadcast(json.dumps(answer).encode(), mine))
    if failed is not None:
        raise failed
    if "value" not in answer:
        raise InputError(answer["input"]) if "input" in answer else RunError(answer["run"])
    return answer["value"]


def _broadcast(message: bytes, mine: bool) -> bytes:
    """The message of the process where `mine` is true, in all."""
    data = np.frombuffer(message, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), mine))
    buffer = np.zeros(1 << max(8, (length - 1).bit_length()), np.uint8)  # few sizes, so few compilations
    if mine:
        buffer[:length] = data
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer, mine))[:length].tobytes()


def alike(advice: str, **values: str) -> None:
    """Raises InputError, in all processes, where they do not have the same values; it names those that differ."""
    if count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in values.values()]
    found = np.asarray(multihost_utils.process_allgather(np.stack(digests)))
    differing = [name for i, name in enumerate(values) if (found[:, i] != found[:1, i]).any()]
    if differing:
        raise InputError(f"the processes of this run differ in: {', '.join(differing)}; {advice}")


def fetch(tree: Any) -> Any:
    """Device arrays to NumPy, whole, in every process, wherever their shards lie."""
    if count() == 1:
        return jax.device_get(tree)  # all copies at once

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_get(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


_kept: list[Any] = []  # what C code holds pointers to


def _end_in_one_line() -> None:
    """Where the runtime finds a peer dead it aborts with a stack dump: have that in a file, here a line and status 1.

    From now on Python's stdout and stderr are copies of what they were, and what C++ code writes there is for the file.
    """
    notices = tempfile.TemporaryFile()  # noqa: SIM115 (open to the end)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    for number in (1, 2):
        os.dup2(notices.fileno(), number)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        if not _speaking.acquire(blocking=False):
            time.sleep(2 * LEAVE_SECONDS)  # the main thread is about to exit
        try:
            said = os.pread(notices.fileno(), 1 << 20, 0)
            reason = _GONE if b"distributed service detected" in said else "the runtime aborted"
            reason = reason if _joined.is_set() else _ALONE
            with tempfile.NamedTemporaryFile(prefix="heal-", suffix=".log", delete=False) as file:
                file.write(said)
            os.write(sys.stderr.fileno(), f"heal: {reason} (details: {file.name})\n".encode())
        finally:
            asked = signals.asked()
            os._exit(128 + asked if asked else 1)

    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    _kept.extend([aborted, notices])
