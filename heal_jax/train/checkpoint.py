"""Checkpoints of a training, by Orbax: kept, checksummed, found whole or damaged, gone on from.

A checkpoint counts once its folder holds SUMS, the checksums of its files, which is written after Orbax's own commit.
Folders are as `storage.place` gives them: on disk or on a bucket.
"""

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from heal_jax import storage
from heal_jax.errors import RunError, out_of_memory
from heal_jax.processes import count, primary
from heal_jax.store import digest, file_sha256, remove, set_aside, write_json

KEEP = 2  # checkpoints: the latest, and the one before in case the latest is damaged
WRITE_SECONDS = 600  # for a checkpoint; longer, and the training ends with an error
REASON_SECONDS = 20  # in which the process that could not write can say why, before those end that waited for it
DEV = "dev.json"  # step -> accuracy on the dev problems
SUMS = "sha256.json"  # file -> checksum
_COMMITTED = "commit_success.txt"  # Orbax's


@dataclasses.dataclass
class Progress:
    """What training has done: optimizer steps, tokens (padding not counted), tokens in the loss, seconds; how many of
    the steps were not finite and changed nothing."""

    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclasses.dataclass
class _Kept:
    """Which checkpoints Orbax keeps: the latest, and the best on dev problems."""

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [i >= len(checkpoints) - KEEP or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
    """Orbax's checkpointer of a folder. Checksums are computed in a thread, as the files are written.

    dev: accuracy on the dev problems after the steps that were assessed; on disk, too.
    """

    def __init__(self, orbax: ocp.training.Checkpointer, folder: Path, kept: _Kept):
        self.orbax, self.folder, self._kept = orbax, folder, kept
        self.dev = _read_dev(folder)
        self._kept.best = self.best
        self._pool = ThreadPoolExecutor(1, "checksums")
        self._sums: Future[None] | None = None
        self._given_up = threading.Event()

    def save(self, step: int, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Begin to write a checkpoint, when the one before is whole. Raises RunError where that cannot be written."""
        self.wait()
        storage.push(self.folder)  # what was logged up to here
        with _writing(self.folder):
            self.orbax.save_async(step, state, force=True, custom_metadata=metadata)
        if primary():
            self._sums = self._pool.submit(self._checksum, self.folder / str(step))

    @property
    def best(self) -> int | None:
        """The step that is best on the dev problems, of equals the latest; None where nothing was assessed."""
        return _best(self.dev)

    def assessed(self, step: int, accuracy: float) -> None:
        """Note a step's accuracy on the dev problems."""
        self.dev[step] = accuracy
        self._kept.best = self.best
        if primary():
            write_json(self.folder / DEV, {"accuracy": self.dev, "sha256": digest(self.dev)})

    def load(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        """A state saved before, placed as in `target`."""
        return self.orbax.load(step, target)

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises RunError where it cannot be written."""
        with _writing(self.folder):
            self.orbax.wait()
            if self._sums is not None:
                self._sums.result()

    def close(self) -> None:
        try:
            self.orbax.close()
        finally:
            self._given_up.set()
            self._pool.shutdown()

    def _checksum(self, step: Path) -> None:
        """Wait for Orbax's commit (on disk a rename of the whole folder) and write the checksums."""
        while not (step / _COMMITTED).is_file():
            if self._given_up.wait(0.05) and not (step / _COMMITTED).is_file():
                return
        write_json(step / SUMS, _sums(step))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkpoints]:
    """Closed at the end; after an error of one of several processes it is not, since that waits for all."""
    kept = _Kept()
    context = ocp.Context()
    context.asynchronous.timeout_secs = WRITE_SECONDS
    with context:
        checkpoints = Checkpoints(ocp.training.Checkpointer(folder, preservation_policy=kept), folder, kept)
        try:
            yield checkpoints
        except BaseException:
            if count() == 1:
                checkpoints.close()
            raise
        checkpoints.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, TimeoutError) and count() > 1:
            time.sleep(REASON_SECONDS)
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{folder}: a checkpoint cannot be written ({reason}); start again: it goes on") from error


def require_room(folder: Path, state: dict[str, Any]) -> None:
    """Raises RunError where the disk has no room for a checkpoint of this state; a bucket always has."""
    if not isinstance(folder, Path):
        return
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: {free >> 20} MiB of disk are free, a checkpoint takes {needed >> 20}; make room and start again"
        )


def restore(
    checkpointer: ocp.training.Checkpointer, target: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], Progress, Any]:
    """The latest checkpoint, placed as in `target`, and the state of the data where it lies within a phase.

    Raises RunError where it cannot be read, and where it is another training's.
    """
    latest = checkpointer.latest
    try:
        metadata = checkpointer.metadata(latest).custom_metadata
        training, progress = metadata["training"], Progress(**metadata["progress"])
        data = metadata["data"]
        differing = [name for name in identity if training.get(name) != identity[name]]
        state = None if differing else checkpointer.load(latest, target)
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{latest.path}: cannot be read ({reason}); remove it to go on from the one before") from error
    if state is None:
        raise RunError(
            f"{latest.path}: of another training, with different {' and '.join(differing)}; "
            f"remove {checkpointer.directory} to train anew"
        )
    return state, progress, data


def _best(dev: dict[int, float]) -> int | None:
    return max(dev, key=lambda step: (dev[step], step), default=None)


def _read_dev(folder: Path) -> dict[int, float]:
    """Raises ValueError where it is damaged."""
    path = folder / DEV
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        dev = {int(step): float(accuracy) for step, accuracy in found["accuracy"].items()}
        if digest(dev) == found["sha256"]:
            return dev
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: damaged")


def keep_whole(folder: Path, ends: Collection[int] = ()) -> list[str]:
    """Leave a folder with a whole checkpoint as its latest, and the best on dev problems up to it whole, too, or with
    none, for one process to call. ends: the steps that are assessed on dev problems. Lines to say.

    What Orbax was writing is removed, and so are steps without its commit file or without checksums: a save or a copy
    was cut short, yet Orbax may list it as whole. Those with other checksums are damaged: they are renamed
    STEP.damaged, and on a bucket, which knows no renames, removed.
    """
    lines: list[str] = []
    try:
        if not set(dev := _read_dev(folder)) <= set(ends):
            raise ValueError(f"{folder / DEV}: of another training")
    except ValueError as error:  # nothing else knows which checkpoint was the best
        dev = {}
        lines.append(f"note: {error}")
        for path in folder.glob("[0-9]*"):
            remove(path)
        (folder / DEV).unlink()
    for path in folder.glob("*.orbax-checkpoint-tmp"):
        remove(path)
    steps = {int(path.name): path for path in folder.glob("[0-9]*") if path.name.isdigit()}
    for number in sorted(steps, reverse=True):
        step = steps[number]
        if not ((step / _COMMITTED).is_file() and (step / SUMS).is_file()):
            remove(step)
        elif damaged := _damaged(step):
            lines.append(f"note: {step}: {damaged}; {_out_of_the_way(step)}")
        elif without := _without_best(folder, steps, dev, ends, number):
            lines.append(without)
            for path in steps.values():
                remove(path)
            break
        else:
            return [f"{line}; training goes on from {step}" for line in lines]
    return [f"{line}; training starts anew" for line in lines]


def _without_best(
    folder: Path, steps: dict[int, Path], dev: dict[int, float], ends: Collection[int], latest: int
) -> str:
    """What is wrong with the best checkpoint up to the latest, which is whole; nothing where the best is, too."""
    if gone := {end for end in ends if end < latest} - set(dev):
        return f"note: {folder / DEV}: what was found after step {min(gone)} is gone"
    best = _best({end: accuracy for end, accuracy in dev.items() if end <= latest})
    if best in (None, latest):
        return ""
    damaged = _damaged(steps[best]) if best in steps and steps[best].is_dir() else "gone"
    return f"note: {folder / str(best)}: the best checkpoint is {damaged}" if damaged else ""


def _damaged(step: Path) -> str:
    """What is not as it was written; nothing where all is."""
    try:
        sums = json.loads((step / SUMS).read_text(encoding="utf-8"))
        wrong = [name for name, recorded in sums.items() if not _holds(step / name, recorded)]
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{SUMS} is damaged"
    return f"damaged ({', '.join(sorted(wrong)[:3])})" if wrong else ""


def _out_of_the_way(step: Path) -> str:
    if isinstance(step, Path):
        return f"set aside as {set_aside(step, '.damaged').name}"
    remove(step)
    return "removed"


def _sums(step: Path) -> dict[str, str]:
    """The checksum of every file; on a bucket the store's own, since a large state is not read again."""
    if not isinstance(step, Path):
        return storage.checksums(step)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return {str(path.relative_to(step)): file_sha256(path, sync=True) for path in files}


def _holds(path: Path, recorded: str) -> bool:
    """Whether a file has this checksum, of either kind: checkpoints may have been copied to disk, or from it."""
    if not path.is_file():
        return False
    return (storage.checksum(path) if recorded.startswith("crc32c:") else file_sha256(path)) == recorded
