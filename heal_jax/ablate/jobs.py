"""Work for several processes of one machine, each with processors of its own.

XLA's CPU backend keeps little more than one core busy with small models, so two arms at a time take half as long. Each
has as many threads as one alone would have, for the same bytes; NPROC gives another number.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from heal_jax import signals
from heal_jax.errors import InputError, RunError
from heal_jax.problems import worker
from heal_jax.processors import threads, usable
from heal_jax.progress import Progress

# glibc gives a buffer back to the system when it is freed, and the next step's is made of new pages. Keeping it saves a
# quarter of an arm's time (126 s, 97 s); it can be said at a process's start alone.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}

Submit = Callable[..., "Future[Any]"]
Child = tuple["subprocess.Popen[bytes]", Connection]


@contextlib.contextmanager
def opened(count: int, progress: Progress) -> Iterator[Submit]:
    """A function that calls another one (of a module; its result and arguments can be pickled) as f(*args, progress):
    in one of `count` child processes, or here and at once where that is 1. Errors are those of f, and what it says is
    said here. Raises RunError where a child dies. On the way out, children end in the middle of their work, as after
    SIGTERM: a training saves a checkpoint.
    """
    if count == 1:
        yield lambda f, *args: _here(f, *args, progress)
        return
    children: list[Child] = []
    free: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def call(f: Callable[..., Any], *args: Any) -> Any:
        process, connection = child = free.get()
        try:
            connection.send((f, args))
            value, error, trace, said = connection.recv()
        except (EOFError, OSError):
            raise RunError(
                f"a process of --jobs died (exit status {process.wait()}; -9 is mostly for want of memory); the same "
                "command with fewer --jobs goes on"
            ) from None
        free.put(child)
        for line in said:
            progress.say(line)
        if trace:
            print(trace, file=sys.stderr)
        if error is not None:
            raise error
        return value

    with ThreadPoolExecutor(count) as callers:
        try:
            for i in range(count):
                children.append(child := worker.start("heal_jax.ablate.jobs", "work", MALLOC))
                child[1].send((i, count))
                free.put(child)
            yield lambda f, *args: callers.submit(call, f, *args)
        finally:
            for process, _ in children:
                process.terminate()
            deadline = time.monotonic() + signals.GRACE - 1  # ours may run as well
            for process, _ in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                process.kill()
                process.wait()
            for _, connection in children:
                with contextlib.suppress(OSError):
                    connection.close()


class _Told(Progress):
    """Keeps the lines that stay, for the parent to say."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def _here(f: Callable[..., Any], *args: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(f(*args))
    return future


def work(connection: Connection) -> None:
    """A child's life: calls what it is sent, and ends with its parent."""
    signals.install()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_ends_with, args=(os.getppid(),), daemon=True).start()
    try:
        _serve(connection)
    except (EOFError, signals.Stopped):
        os._exit(0)  # the interpreter's own end would wait for threads of libraries


def _serve(connection: Connection) -> None:
    index, count = connection.recv()
    os.environ["NPROC"] = str(threads())  # as many as without --jobs
    if (mine := usable()[index::count]) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)
    from heal_jax import cache, hush

    hush()
    cache.enable(lambda line: None)  # the parent has said it
    while True:
        f, args = connection.recv()
        value, error, trace, progress = None, None, "", _Told()
        try:
            value = f(*args, progress)
        except (InputError, RunError, OSError) as known:
            error = known
        except Exception as unknown:
            error, trace = RunError(f"a process of --jobs failed ({unknown!r})"), traceback.format_exc()
        connection.send((value, error, trace, progress.lines))


def _ends_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
