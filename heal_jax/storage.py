"""Run directories on Google Cloud Storage (gs://BUCKET/PATH): a working copy on disk, kept in step.

All modules, and libraries that know no buckets (ArrayRecord, safetensors, TensorBoard), write to a local folder as they
always do, and one place copies whole files up before the manifest that names them, so nothing has a second way of
writing and nothing needs a rename or an append. Checkpoints alone never touch the local disk, which may be too small:
Orbax and tensorstore write them to the bucket, each process its own part.

The bucket is what counts: a working copy is filled when it is opened and removed in the end.
"""

import base64
import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heal_jax.errors import InputError, RunError

UNREAD = ("export", "adapter", "dataset", "tensorboard")  # a run writes them and others read them: not filled in
ASIDE = (".damaged", ".outdated")  # the same
APPENDED = ("metrics.jsonl", "tensorboard")  # may grow while they are copied
PREFIX = "heal-bucket-"  # of working copies, in the folder for temporary files
PATIENCE = 10  # seconds for the first answer of a bucket: what waits longer does not reach it
YOUNG = 60  # seconds in which a new one may not be locked yet

_copies: list["_Copy"] = []  # that this process has open


def address(path: str | os.PathLike[str]) -> str | None:
    """gs://BUCKET/PATH where the path is on a bucket (pathlib makes one slash of two); None for a path on disk.

    Raises InputError for other stores, without a bucket, and where gcsfs is not installed.
    """
    if re.fullmatch("gs:/*", os.fspath(path)):
        raise InputError("gs://: names no bucket; gs://BUCKET/PATH is expected")
    found = re.fullmatch(r"(gs|s3|az|hf):/+([^/].*)", os.fspath(path), re.DOTALL)
    if found is None:
        return None
    url = f"{found[1]}://{found[2].rstrip('/')}"
    if found[1] != "gs":
        raise InputError(f"{url}: a run can be on disk or on gs://, not on {found[1]}://")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{url}: buckets need a package that is not installed: pip install 'heal-jax[gcs]'")
    return url


def filesystem() -> Any:
    """gcsfs, for us and for all that go through fsspec (Orbax, JAX's cache): others write, so no listing is kept."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what we say in a line
    return fsspec.filesystem("gcs")


def require(url: str) -> None:
    """Raises InputError where objects cannot be written below this URL, and deleted again."""
    from fsspec.asyn import sync

    probe, objects = f"{url}/.probe-{uuid.uuid4().hex}", filesystem()
    try:
        sync(objects.loop, objects._pipe_file, probe, b"", timeout=PATIENCE)
        objects.rm_file(probe)
    except TimeoutError:
        raise InputError(
            f"{url}: no answer in {PATIENCE} seconds; check that this machine reaches Google Cloud Storage and has "
            "credentials"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{url}: no such bucket, or it may not be seen; make it, or correct the name") from None
    except Exception as error:  # of many kinds: networks, accounts
        raise InputError(
            f"{url}: cannot be written ({_reason(error)}); check that this machine has credentials (`gcloud auth "
            "application-default login`, or a service account) which may create and delete objects there"
        ) from None


def _reached(url: str) -> None:
    """Raises InputError where the bucket cannot be asked, which gcsfs by itself tries for a minute."""
    from fsspec.asyn import sync

    objects = filesystem()
    try:
        sync(objects.loop, objects._exists, f"{url}/manifest.json", timeout=PATIENCE)
    except TimeoutError:
        raise InputError(f"{url}: no answer in {PATIENCE} seconds; check that this machine reaches it") from None
    except Exception as error:  # of many kinds: networks, accounts
        raise InputError(f"{url}: cannot be read ({_reason(error)}); check the name and your credentials") from None


@contextlib.contextmanager
def opened(path: Path, write: bool = True) -> Iterator[Path]:
    """The folder to work in: a path on disk as it is; of one on a bucket a working copy, with what was written there.

    What is written in it is on the bucket after `push` and, with `write`, in the end. Errors name objects, not their
    copies. Raises InputError as `address` does, and where the bucket cannot be reached or, with `write`, written.
    """
    url = address(path)
    if url is None:
        yield path
        return
    (require if write else _reached)(url)
    with _scratch() as folder:
        copy = _Copy(folder / url.rpartition("/")[2], url)
        _copies.append(copy)
        try:
            copy.pull("")
            yield copy.root
            if write:
                copy.push()
        except (InputError, RunError) as error:
            raise type(error)(shown(error)) from error
        finally:
            _copies.remove(copy)


def push(path: Any, seconds: float = 0.0) -> None:
    """Have everything in the working copy that holds this path on the bucket, the manifest last; or, where that was
    done less than `seconds` ago, leave it. Nothing for a path on disk.

    Raises RunError where it cannot be written, or where another run has taken the bucket's run over.
    """
    if copy := _holding(path):
        copy.push(seconds)


def pull(path: Path) -> bool:
    """Have a file or folder as the bucket has it, where another process wrote it. False for a path on disk."""
    if copy := _holding(path):
        copy.pull("" if path == copy.root else path.relative_to(copy.root).as_posix())
    return copy is not None


def place(path: Path) -> Any:
    """Where a library that can write to buckets is to write: an etils.epath.Path; a path on disk as it is."""
    if copy := _holding(path):
        from etils import epath

        return epath.Path(copy.url) / path.relative_to(copy.root)
    return path


def shown(text: object) -> str:
    """A text with the addresses of objects in place of the paths of their copies."""
    said = str(text)
    for copy in _copies:
        said = said.replace(str(copy.root), copy.url)
    return said


def guard(path: Path, check: Callable[[], None]) -> None:
    """Have `check` called before anything more is written to the bucket: it raises where that must not be."""
    if copy := _holding(path):
        copy.check = check


def checksum(path: Any) -> str:
    """The CRC-32C of an object, which the store itself keeps, or of a file. Raises InputError without the package."""
    if not isinstance(path, Path):
        return f"crc32c:{filesystem().info(str(path))['crc32c']}"
    if importlib.util.find_spec("google_crc32c") is None:
        raise InputError(f"{path}: comes from a bucket; to check it, pip install 'heal-jax[gcs]'")
    return f"crc32c:{_crc32c(path)}"


def checksums(folder: Any) -> dict[str, str]:
    """The same of every object below a `place`, by its name from there on."""
    found = filesystem().find(str(folder), detail=True).items()
    start = len(str(folder).removeprefix("gs://")) + 1
    return {name[start:]: f"crc32c:{info['crc32c']}" for name, info in sorted(found)}


def _crc32c(path: Path) -> str:
    import google_crc32c

    found = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return base64.b64encode(found.digest()).decode()


def _holding(path: Any) -> "_Copy | None":
    """The working copy that a path or an address is in."""
    for copy in _copies:
        for base in (str(copy.root), copy.url):
            if str(path) == base or str(path).startswith(f"{base}/"):
                return copy
    return None


class _Copy:
    """A folder and the objects that it stands for. Names are relative to both."""

    def __init__(self, root: Path, url: str):
        self.root, self.url, self.objects = root, url, filesystem()
        self.check: Callable[[], None] = lambda: None
        self._known: dict[str, tuple[int, int, int]] = {}  # files, as they were when the bucket had the same
        self._mutex = threading.RLock()  # a checkpoint is checksummed in a thread
        self._pushed = 0.0
        root.mkdir(parents=True)

    def pull(self, below: str) -> None:
        with self._mutex, self._saying("read"):
            found = self._listed(below)
            new = [name for name, crc32c in found.items() if not self._same(name, crc32c)]
            for name in new:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            if new:
                self.objects.get(*self._pairs(new)[::-1])
            for name in [name for name in self._known if _within(name, below) and name not in found]:
                (self.root / name).unlink(missing_ok=True)
                del self._known[name]
            self._known |= {name: _stamp(self.root / name) for name in found}

    def push(self, seconds: float = 0.0) -> None:
        with self._mutex:
            if time.monotonic() - self._pushed < seconds:
                return
            files = (path for path in self.root.rglob("*") if path.is_file())
            here = {path.relative_to(self.root).as_posix(): _stamp(path) for path in files}
            here = {name: stamp for name, stamp in here.items() if _is_copied(name)}
            gone = [name for name in self._known if name not in here]
            new = [name for name in here if self._known.get(name) != here[name]]
            with self._saying("written"):
                if gone or new:
                    self.check()
                for name in gone:
                    with contextlib.suppress(FileNotFoundError):
                        self.objects.rm_file(f"{self.url}/{name}")
                    del self._known[name]
                last = [name for name in ("manifest.json", "manifest.json.backup") if name in new]
                self._put([name for name in new if name not in last], here)
                for name in last:
                    self._put([name], here)
            self._pushed = time.monotonic()

    def _put(self, names: list[str], here: dict[str, tuple[int, int, int]]) -> None:
        grown = [name for name in names if name.split("/")[0] in APPENDED]
        for name in grown:
            self.objects.pipe_file(f"{self.url}/{name}", (self.root / name).read_bytes())
        if whole := [name for name in names if name not in grown]:
            self.objects.put(*self._pairs(whole))
        self._known |= {name: here[name] for name in names}

    def _pairs(self, names: list[str]) -> tuple[list[str], list[str]]:
        return [str(self.root / name) for name in names], [f"{self.url}/{name}" for name in names]

    def _listed(self, below: str) -> dict[str, str]:
        """Name -> CRC-32C of the objects that a working copy holds."""
        try:
            infos = self.objects.find(f"{self.url}/{below}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.url.removeprefix("gs://")) + 1
        named = {name[start:]: info["crc32c"] for name, info in infos.items() if info["type"] == "file"}
        return {
            name: crc32c
            for name, crc32c in named.items()
            if _is_copied(name) and _within(name, below) and (below or _is_read(name))
        }

    def _same(self, name: str, crc32c: str) -> bool:
        path = self.root / name
        return path.is_file() and _crc32c(path) == crc32c

    @contextlib.contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        try:
            yield
        except RunError:
            raise
        except Exception as error:  # of many kinds: networks, accounts
            raise RunError(
                f"{self.url}: cannot be {what} ({_reason(error)}); give the same command again: it goes on"
            ) from error


def _is_copied(name: str) -> bool:
    """Whether an object of this name has a copy. Names come from strangers: those that lead elsewhere have none."""
    parts = name.split("/")
    hidden = any(not part or part.startswith(".") or part.endswith(".partial") or "\0" in part for part in parts)
    return parts[0] != "checkpoints" and not hidden


def _is_read(name: str) -> bool:
    return name.split("/")[0] not in UNREAD and not name.endswith(ASIDE)


def _within(name: str, below: str) -> bool:
    return not below or name == below or name.startswith(f"{below}/")


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A new folder that is removed in the end. Those that killed processes left go now: nobody holds their locks."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > YOUNG:
                with _locked(left):
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process holds the lock, or the folder is another user's."""
    if folder.lstat().st_uid != os.getuid():
        raise PermissionError
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
