"""heal report and heal show: what a run directory holds."""

import dataclasses
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import tyro

from heal_jax import storage
from heal_jax.commands.arguments import parse, run_directory
from heal_jax.errors import InputError
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write report.html from what a run directory holds, and print where it is."""

    directory: tyro.conf.Positional[Path]
    """A run directory, finished or not; also gs://BUCKET/PATH."""
    open: bool = False
    """Show it in a browser, where there is one."""


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Print a rollout with its entropies, or list what there is. Without a terminal there are no colours; FORCE_COLOR=1
    keeps them, for `less -R`."""

    directory: tyro.conf.Positional[Path]
    """A run directory; also gs://BUCKET/PATH."""
    rollout_id: tyro.conf.Positional[str | None] = None
    """As in the list; without it rollouts are listed."""
    kind: Literal["base", "hindsight", "repair"] | None = None
    """List those of a kind."""
    grade: Literal["correct", "wrong", "unparsable", "truncated", "timeout"] | None = None
    """List those of a grade."""
    problem: str | None = None
    """List those of a problem, by its id."""
    stratum: Literal["solved", "hard", "unsolved"] | None = None
    """List those of problems of a stratum; hard has the unsolved, too."""
    kept: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List those that a stage of the curriculum has."""
    dropped: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List those that none has, with the reason."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """List so many at most; 0: all."""


def report(command: str, argv: list[str], progress: Progress) -> int:
    arguments = parse(ReportArguments, command, argv)
    from heal_jax.report.page import write_report

    with storage.opened(arguments.directory) as folder:
        path = storage.shown(write_report(run_directory(folder)))
    print(path, flush=True)
    if arguments.open:
        url = Path(path).resolve().as_uri()
        if path.startswith("gs://"):
            url = f"https://storage.cloud.google.com/{path.removeprefix('gs://')}"
        if not _opened(url):
            progress.say(f"note: no browser here could be started; open {url} in one")
    return 0


def _opened(url: str) -> bool:
    """Whether a browser was started; a remote machine has none, or one that fails."""
    try:
        return webbrowser.open(url)
    except (webbrowser.Error, OSError, ValueError):
        return False


def show(command: str, argv: list[str], progress: Progress) -> int:
    arguments = parse(ShowArguments, command, argv)
    if arguments.kept and arguments.dropped:
        raise InputError("show: --kept and --dropped leave nothing; give one of them")
    if arguments.limit < 0:
        raise InputError(f"--limit: {arguments.limit} is out of range, allowed: >= 0")
    from heal_jax.report.listing import Filters, rollouts
    from heal_jax.report.show import show as print_rollout

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Filters)}
    if arguments.rollout_id is not None and Filters(**given) != Filters():
        raise InputError("show: a ROLLOUT_ID is printed whole; leave the filters out, or the id to list")
    with storage.opened(arguments.directory, write=False) as folder:
        root = run_directory(folder)
        if arguments.rollout_id is None:
            rollouts(root, Filters(**given), arguments.limit, progress.printer)
        else:
            print_rollout(root, arguments.rollout_id, progress.printer)
    return 0
