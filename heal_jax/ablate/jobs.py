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
    in one of `count` child processes, or here and at once where that is 1. Errors are those of f. Raises RunError where
    a child dies. On the way out, children end in the middle of their work.
    """
    if count == 1:
        yield lambda f, *args: _here(f, *args, progress)
        return
    children: list[Child] = [worker.start("heal_jax.ablate.jobs", "work", MALLOC) for _ in range(count)]
    free: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for i, child in enumerate(children):
        child[1].send((i, count))
        free.put(child)

    def call(f: Callable[..., Any], *args: Any) -> Any:
        process, connection = child = free.get()
        try:
            connection.send((f, args))
            value, error, trace = connection.recv()
        except (EOFError, OSError):
            raise RunError(
                f"a process of --jobs died (exit status {process.wait()}; -9 is mostly for want of memory); the same "
                "command with fewer --jobs goes on"
            ) from None
        free.put(child)
        if trace:
            print(trace, file=sys.stderr)
        if error is not None:
            raise error
        return value

    with ThreadPoolExecutor(count) as threads:
        try:
            yield lambda f, *args: threads.submit(call, f, *args)
        finally:
            for process, _ in children:
                process.kill()
                process.wait()
            for _, connection in children:
                with contextlib.suppress(OSError):
                    connection.close()


def _here(f: Callable[..., Any], *args: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(f(*args))
    return future


def work(connection: Connection) -> None:
    """A child's life: calls what it is sent, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_ends_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError):
        index, count = connection.recv()
        os.environ["NPROC"] = str(threads())  # as many as without --jobs
        if (mine := usable()[index::count]) and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        from heal_jax import cache, hush

        hush()
        progress = Progress(quiet=True)
        cache.enable(progress.say)
        while True:
            f, args = connection.recv()
            value, error, trace = None, None, ""
            try:
                value = f(*args, progress)
            except (InputError, RunError, OSError) as known:
                error = known
            except Exception as unknown:
                error, trace = RunError(f"a process of --jobs failed ({unknown!r})"), traceback.format_exc()
            connection.send((value, error, trace))


def _ends_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
