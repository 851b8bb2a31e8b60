"""Checkpoints of a training, by Orbax: kept, found whole or damaged, gone on from."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from heal_jax.errors import RunError
from heal_jax.processes import count

KEEP = 2  # checkpoints: the latest, and the one before in case the latest is damaged
WRITE_SECONDS = 600  # for a checkpoint; longer, and the training ends with an error


@dataclasses.dataclass
class Progress:
    """What training has done: optimizer steps, tokens (padding not counted), tokens in the loss, seconds; how many of
    the steps were not finite and changed nothing."""

    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[ocp.training.Checkpointer]:
    """Orbax's, closed at the end; after an error of one of several processes it is not, since that waits for all."""
    policy = ocp.training.preservation_policies.LatestN(KEEP)
    context = ocp.Context()
    context.asynchronous.timeout_secs = WRITE_SECONDS
    with context:
        checkpointer = ocp.training.Checkpointer(folder, preservation_policy=policy)
        try:
            yield checkpointer
        except BaseException:
            if count() == 1:
                checkpointer.close()
            raise
        checkpointer.close()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{folder}: a checkpoint cannot be written ({reason}); start again: it goes on") from error


def require_room(folder: Path, state: dict[str, Any]) -> None:
    """Raises RunError where the disk has no room for a checkpoint of this state."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: {free >> 20} MiB of disk are free, a checkpoint takes {needed >> 20}; make room and start again"
        )


def restore(
    checkpointer: ocp.training.Checkpointer, target: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], Progress, Any]:
    """The latest checkpoint, placed as in `target`, and the state of the data where it lies within a phase. Raises
    RunError where it is damaged or another training's."""
    latest = checkpointer.latest
    try:
        metadata = checkpointer.metadata(latest).custom_metadata
        training, progress = metadata["training"], Progress(**metadata["progress"])
        data = metadata["data"]
        differing = [name for name in identity if training.get(name) != identity[name]]
        state = None if differing else checkpointer.load(latest, target)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{latest.path}: damaged ({reason}); remove it to go on from the one before") from error
    if state is None:
        raise RunError(
            f"{latest.path}: of another training, with different {' and '.join(differing)}; "
            f"remove {checkpointer.directory} to train anew"
        )
    return state, progress, data


def remove_torn(folder: Path) -> None:
    """Remove steps without Orbax's commit file: a save or a copy was cut short, yet Orbax may list it as whole."""
    for step in folder.glob("[0-9]*"):
        if not (step / "commit_success.txt").is_file():
            shutil.rmtree(step, ignore_errors=True)
