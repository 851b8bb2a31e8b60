"""One run works in a directory at a time.

On disk the lock is the kernel's (flock) and ends with the process that holds it, however that ends; the file stays.

A bucket has no such locks. There the holder has an object .lock/NUMBER, and the highest number holds. It is created
where no object of that name is, which of several processes one alone can do, and written again every BEAT seconds. A
newcomer that finds one watches it for STALE seconds: where it is written meanwhile its holder is alive, otherwise the
newcomer takes the next number. Limits: a start after a kill waits that long, except on the machine of the process that
was killed; and a holder that was stopped, or cut off from the bucket, for longer is taken for dead. When it wakes it
finds the higher number before it writes the next files, and ends; the file or checkpoint under way still lands.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from heal_jax import storage
from heal_jax.errors import RunError

NAME = ".lock"
BEAT = 10.0  # seconds
STALE = 45.0  # seconds: some beats may fail
LONG_AGO = timedelta(minutes=10)  # clocks differ by less: not looked at

Say = Callable[[str], None]


@contextlib.contextmanager
def lock(out: Path, command: str, say: Say) -> Iterator[None]:
    """Make the directory; one run works in it. Raises RunError where another one does, which the lock tells of."""
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    ours = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": now}
    with _of_bucket(out, ours, say) if _url(out) else _of_kernel(out, ours, say):
        yield


def holder(out: Path) -> str:
    """What tells the lock of a run from that of any other; empty where no run holds it."""
    if url := _url(out):
        held = _numbers(url)
        return f"{url}/{NAME}/{held[-1]:06d}" if held else ""
    path = out / NAME
    return path.read_text() if path.is_file() else ""


@contextlib.contextmanager
def _of_kernel(out: Path, ours: dict[str, Any], say: Say) -> Iterator[None]:
    path = out / NAME
    try:  # never through a link: what it points to would be overwritten
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunError(f"{path}: cannot be opened ({error.strerror}); remove it") from None
    with open(number, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(_held(out, file.read())) from None
        except OSError as error:
            raise RunError(f"{out}: its file system has no locks ({error.strerror}); use another --out") from None
        if before := _told(file.read()):
            say(_left(out, before))
        file.truncate(0)
        file.write(json.dumps({"id": uuid.uuid4().hex, **ours}))
        file.flush()
        os.fsync(file.fileno())
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def _of_bucket(out: Path, ours: dict[str, Any], say: Say) -> Iterator[None]:
    url, objects = _url(out), storage.filesystem()
    number, ended = _taken(out, url, ours, say), threading.Event()
    lost = threading.Event()

    def beat() -> None:
        for count in range(1, 1 << 62):
            if ended.wait(BEAT) or lost.is_set():
                return
            with contextlib.suppress(Exception):  # the next one may succeed
                check()
                objects.pipe_file(_object(url, number), json.dumps({**ours, "beat": count}).encode())

    def check() -> None:
        if lost.is_set() or _numbers(url)[-1:] != [number]:
            lost.set()
            raise RunError(
                f"{url}: another run took it over, since this one did not answer for {STALE:.0f} s; "
                "what it had finished is kept"
            )

    beating = threading.Thread(target=beat, daemon=True, name="lock")
    beating.start()
    storage.guard(out, check)
    try:
        storage.pull(out)  # another run may have worked there until now
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong is said already
            storage.push(out)
        raise
    else:
        storage.push(out)
    finally:
        ended.set()
        beating.join()
        if not lost.is_set():
            with contextlib.suppress(Exception):
                objects.rm_file(_object(url, number))


def _taken(out: Path, url: str, ours: dict[str, Any], say: Say) -> int:
    """The number with which we hold the lock."""
    objects, ours = storage.filesystem(), {**ours, "beat": 0}
    watched, since = "", time.monotonic()
    try:
        while True:
            number = (_numbers(url) or [0])[-1]
            text, age = _read(url, number) if number else ("", timedelta(0))
            if text and text != watched and watched.partition('"beat"')[0] == text.partition('"beat"')[0]:
                raise RunError(_held(out, text))
            if text != watched:
                watched, since = text, time.monotonic()
            if not text or _is_dead(text, ours) or age > LONG_AGO or time.monotonic() - since > STALE:
                with contextlib.suppress(FileExistsError):  # another one was faster
                    objects.pipe_file(_object(url, number + 1), json.dumps(ours).encode(), mode="create")
                    if before := _told(text):
                        say(_left(out, before))
                    if number:
                        objects.rm_file(_object(url, number))
                    return number + 1
            elif time.monotonic() - since < 1:
                say(f"note: {out}: waiting up to {STALE:.0f} s to see whether{_told(text)} is still at work")
            time.sleep(1)
    except RunError:
        raise
    except Exception as error:  # of many kinds: networks, accounts
        raise RunError(f"{out}: the lock cannot be taken ({error}); try again") from error


def _url(out: Path) -> str:
    """The address of a directory on a bucket; empty for one on disk."""
    place = storage.place(out)
    return "" if isinstance(place, Path) else str(place)


def _object(url: str, number: int) -> str:
    return f"{url}/{NAME}/{number:06d}"


def _numbers(url: str) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        names = [name.rpartition("/")[2] for name in storage.filesystem().find(f"{url}/{NAME}")]
        return sorted(int(name) for name in names if name.isdigit())
    return []


def _read(url: str, number: int) -> tuple[str, timedelta]:
    """What a lock says, and how long ago it was written; nothing where it has just gone."""
    objects, name = storage.filesystem(), _object(url, number)
    try:
        return objects.cat_file(name).decode(errors="replace"), datetime.now(UTC) - objects.modified(name)
    except FileNotFoundError:
        return "", timedelta(0)


def _is_dead(text: str, ours: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine and is gone."""
    try:
        found = json.loads(text)
        if found["host"] == ours["host"]:
            os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        pass
    return False


def _held(out: Path, text: str) -> str:
    return f"{out}: another process is working in it{_told(text)}; wait for it or use another --out"


def _left(out: Path, before: str) -> str:
    return f"note: the last process in {out}{before} did not come to its end; going on after it"


def _told(text: str) -> str:
    """Whom a lock names, in parentheses; nothing where it is empty."""
    try:
        holder = json.loads(text)
        who = [f"process {holder['pid']} on {holder['host']}", holder["command"], f"since {holder['since']}"]
    except (ValueError, TypeError, KeyError):
        return ""
    return f" ({', '.join(part for part in who if part)})"
