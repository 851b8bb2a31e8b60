"""SIGTERM and Ctrl-C: a process that stops in order, and soon.

A signal raises Stopped in the main thread as soon as Python runs there. Inside `deferred` it only leaves a mark, for
what looks at `asked` at moments of its own (training saves a checkpoint first). Python does not run while the main
thread is in compiled code, or in the compiler: a thread ends the process where that takes longer than GRACE. Nothing
that was finished is lost then, since it is on disk already.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE = 7.0  # seconds that the main thread has after SIGTERM: whoever sends it seldom waits longer than ten
AGAIN = 1.0  # seconds after a second Ctrl-C; after the first one there is no limit, since a person can press it again
GOES_ON = "the same command goes on where it stopped"


class Stopped(KeyboardInterrupt):
    """Raised where the process was asked to end. status: its exit status, 130 for Ctrl-C and 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number


_asked: int | None = None  # the signal, when Python has handled it
_received: int | None = None  # the signal, as soon as it came
_raised = False  # once: what is closed on the way out must not be interrupted again
_deferred = 0


def asked() -> int | None:
    """The signal that asked this process to stop."""
    return _received or _asked


def stop() -> None:
    """Raise Stopped; also in a process whose peers were asked."""
    global _raised
    _raised = True
    raise Stopped(asked() or signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal raises nothing; at the end it does. The second one does not wait for that."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if asked() and not _deferred:
        stop()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside `deferred`, for a part of it that can be left at any moment: signals raise here as they do elsewhere."""
    global _deferred
    if asked():
        stop()
    before, _deferred = _deferred, 0
    try:
        yield
    finally:
        _deferred = before


def install() -> None:
    """Handle both signals from now on, in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="signals").start()


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    only_marked = _raised or (_deferred and _asked is None)
    _asked = number
    if not only_marked:
        stop()


def _watch(read: int) -> None:
    """Ends the process where the main thread does not."""
    global _received
    deadline, interrupts = float("inf"), 0
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([read], [], [], None if left == float("inf") else max(0.0, left))
        if not ready:
            _end(_received or signal.SIGTERM)
        for number in os.read(read, 64):
            _received = number
            if number == signal.SIGTERM:
                deadline = min(deadline, time.monotonic() + GRACE)
            elif number == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    deadline = min(deadline, time.monotonic() + AGAIN)


def _end(number: int) -> None:
    said = f"heal: {name(number)} in the middle of work; what was finished is on disk, {GOES_ON}\n"
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            said = "\r\x1b[K\x1b[?25h" + said  # a live display hides the cursor
        os.write(sys.stderr.fileno(), said.encode())  # the main thread may hold the stream's own lock
    os._exit(128 + number)


def name(number: int) -> str:
    """What the signal did, in a word."""
    return "interrupted" if number == signal.SIGINT else "terminated"
