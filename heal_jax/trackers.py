"""Training metrics to where people watch runs: TensorBoard, Weights & Biases, trackio."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from heal_jax.config import LogSpec
from heal_jax.errors import InputError, RunError

# tensorboardX writes TensorBoard's files without TensorFlow.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}

Track = Callable[[int, Mapping[str, float]], None]
"""Given a step and figures by name."""


def require(spec: LogSpec) -> None:
    """Raises InputError where a package that `log.to` asks for is not installed."""
    for name in spec.to:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"log.to: {name} needs a package that is not installed: pip install {PACKAGES[name]}")


@contextlib.contextmanager
def tracking(spec: LogSpec, folder: Path, student: str, config: Mapping[str, Any]) -> Iterator[Track]:
    """Sends what it is given to every tool of `log.to`, as a run of this student that begins with the first figures.
    Raises RunError where one cannot begin, as without its account."""
    with contextlib.ExitStack() as stack:
        tracks: list[Track] = []

        def track(step: int, figures: Mapping[str, float]) -> None:
            if not tracks:
                tracks.extend(_open(name, spec, folder, student, config, stack) for name in spec.to)
            for each in tracks:
                each(step, figures)

        yield track


def _open(
    name: str, spec: LogSpec, folder: Path, student: str, config: Mapping[str, Any], stack: contextlib.ExitStack
) -> Track:
    package = importlib.import_module(PACKAGES[name])
    if name == "tensorboard":
        writer = stack.enter_context(contextlib.closing(package.SummaryWriter(str(folder / "tensorboard" / student))))

        def scalars(step: int, figures: Mapping[str, float]) -> None:
            for key, x in figures.items():
                writer.add_scalar(key, x, step)

        return scalars
    where: dict[str, Any] = {"dir": str(folder)} if name == "wandb" else {}
    try:
        run = package.init(project=spec.project, name=f"{folder.name}-{student}", config=dict(config), **where)
    except Exception as error:  # of many kinds: accounts, networks
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"log.to: {name} cannot begin ({reason}); set it up and start again: the run goes on") from error
    stack.callback(run.finish)
    return lambda step, figures: run.log(dict(figures), step=step)
