"""One run works in a directory at a time."""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from heal_jax.errors import RunError

NAME = ".lock"


@contextlib.contextmanager
def lock(out: Path, command: str, say: Callable[[str], None]) -> Iterator[None]:
    """Make the directory; one run works in it. Raises RunError where another one does, which the lock file tells of.

    The lock is the kernel's (flock) and ends with the process that holds it, however that ends; the file stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    try:  # never through a link: what it points to would be overwritten
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunError(f"{path}: cannot be opened ({error.strerror}); remove it") from None
    with open(number, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{out}: another process is working in it{_told(file)}; wait for it or use another --out"
            ) from None
        except OSError as error:
            raise RunError(f"{out}: its file system has no locks ({error.strerror}); use another --out") from None
        if before := _told(file):
            say(f"note: the last process in {out}{before} did not come to its end; going on after it")
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        ours = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": now}
        file.truncate(0)
        file.write(json.dumps({"id": uuid.uuid4().hex, **ours}))
        file.flush()
        os.fsync(file.fileno())
        try:
            yield
        finally:
            file.truncate(0)


def _told(file: TextIO) -> str:
    """Who wrote the lock file, in parentheses; nothing where it is empty."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = [f"process {holder['pid']} on {holder['host']}", holder["command"], f"since {holder['since']}"]
    except (ValueError, TypeError, KeyError):
        return ""
    return f" ({', '.join(part for part in who if part)})"


def holder(out: Path) -> str:
    """What the lock file says, which no two runs have alike; empty where no run holds it."""
    path = out / NAME
    return path.read_text() if path.is_file() else ""
