"""One case: done under a time limit, a memory limit and an eye on what it opens, and its refusal looked at."""

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from heal_jax.errors import InputError, RunError, one_line

SECONDS = 20  # that a case may take
MEMORY = 4 << 30  # bytes of address space that a case may take
LONGEST = 20_000  # characters of a refusal: weights that do not fit are all listed

# What reading data never does (events of sys.audit).
FORBIDDEN = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect"}


class Failure(Exception):
    """Something that no input may bring about."""


class _Hang(BaseException):
    """Not an Exception: nobody who wraps what a library raises may take it for that."""


@dataclass(frozen=True)
class Kind:
    """A kind of input. valid: a case that is accepted; cases: a hypothesis strategy; attempt: reads a case, made in an
    empty folder; it may raise InputError and RunError; culprits: parts of a message of which a refusal has one."""

    name: str
    valid: Any
    cases: Any = field(repr=False)
    attempt: Callable[[Any, Path], None]
    culprits: Callable[[Any, Path], Sequence[str]]


def refusal(kind: Kind, case: Any, folder: Path) -> str:
    """What is said of a case, empty where it is accepted. Raises Failure, or whatever the reader lets through."""
    try:
        with _alarm(), _bounded(), _audited():
            kind.attempt(case, folder)
        return ""
    except (InputError, RunError) as error:
        said = one_line(error)
    except _Hang:
        raise Failure(f"more than {SECONDS} s") from None
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a library in Rust
        raise Failure(f"{type(error).__name__}: {error}") from error
    if not any(part in said for part in kind.culprits(case, folder)):
        raise Failure(f"the culprit is not named: {said}")
    if len(said) > LONGEST:
        raise Failure(f"a refusal of {len(said)} characters: {said[:200]}...")
    return said


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # and again: callbacks of libraries swallow exceptions
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """What asks for more memory gets MemoryError, where the system can tell how much is used."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        yield
        return
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


_audits: list[list[str]] = []  # hooks cannot be taken away again: one stays, and notes nothing between cases


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _audits and event in FORBIDDEN:
        _audits[-1].append(f"{event} {arguments!r}"[:200])


@contextlib.contextmanager
def _audited() -> Iterator[None]:
    """Raise Failure where data was run as code, or anything was fetched."""
    if _hook not in _hooked:
        sys.addaudithook(_hook)
        _hooked.append(_hook)
    found: list[str] = []
    _audits.append(found)
    try:
        yield
    finally:
        _audits.remove(found)
        if found:
            raise Failure(f"reading ran or fetched something: {found[0]}")


_hooked: list[Any] = []
