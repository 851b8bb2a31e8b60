"""A time limit for Python code from elsewhere that runs in this process, on whatever thread."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block where it takes longer. It ends loops in Python, not a call of compiled code."""
    thread, lock, done, late = threading.get_ident(), threading.Lock(), False, False

    def throw(error: object) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    def ring() -> None:
        nonlocal late
        with lock:
            if not done:
                late = True
                throw(ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            done = True
            if late:
                throw(None)  # what was thrown, and not raised yet
    if late:
        raise TimeoutError
