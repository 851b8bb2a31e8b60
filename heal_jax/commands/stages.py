"""heal run, and each of its stages alone."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from heal_jax.commands.arguments import Said, configured
from heal_jax.config import Config
from heal_jax.progress import Progress

if TYPE_CHECKING:
    from heal_jax.run import Run

STAGES = {
    "sample": "unaided rollouts of the teacher, pass rates, strata",
    "hindsight": "rollouts of hard problems with the answer in the prompt",
    "repair": "GEAR: cut failed rollouts where entropy surges, hint, decode on",
    "curate": "PURE and PACE: what is kept, and the three stages",
    "train": "the student through the curriculum, and the rejection-sampling baseline",
    "evaluate": "teacher and students on held-out problems",
    "export": "the student in Hugging Face format",
}


@dataclasses.dataclass(frozen=True)
class StageArguments:
    """A stage, or all of them."""

    config: tyro.conf.Positional[Path]
    """A YAML file; fields that it leaves out have the defaults below."""
    out: Path
    """The run directory, on disk or gs://BUCKET/PATH; made where it is not there, gone on with where it is."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    said: Annotated[Said, tyro.conf.arg(name="")] = Said()


@dataclasses.dataclass(frozen=True)
class RunArguments(StageArguments):
    """All stages."""

    until: Literal["sample", "hindsight", "repair", "curate", "train", "evaluate", "export"] = "export"
    """The last stage to do; the same command without it goes on from there."""


@dataclasses.dataclass(frozen=True)
class ExportArguments(StageArguments):
    """The last stage, and pushing what it wrote to the Hugging Face hub."""

    push_to_hub: Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")] = ""
    """Upload DIR/export to this model repository, with the token of HF_TOKEN or `hf auth login`. The repository is made
    where it is not there."""
    push_dataset: Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")] = ""
    """Upload DIR/dataset to this dataset repository."""
    public: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make repositories that are not there public; private otherwise. Those that are there stay as they are."""


def main(command: str, argv: list[str], progress: Progress) -> int:
    description = STAGES.get(command, "all stages")
    kind = {"run": RunArguments, "export": ExportArguments}.get(command, StageArguments)
    arguments = configured(kind, command, "--out DIR", argv, description, out=tyro.MISSING)
    names = [command] if command != "run" else list(STAGES)[: list(STAGES).index(arguments.until) + 1]

    pushed = _repositories(arguments) if command == "export" else {}

    from heal_jax import cache, processes
    from heal_jax.pipeline import NEEDS, run_stages
    from heal_jax.run import open_run

    with processes.job():
        if not processes.primary():
            progress.mute()
        cache.enable(progress.say)
        progress.at("checks", "config, problems, models")
        needs, line = NEEDS.get(command, ()), shlex.join(["heal", command, *argv])
        with open_run(arguments.settings, arguments.out, progress, needs, line) as opened:
            run_stages(opened, names)
            if pushed:
                processes.once(lambda: _push(opened, pushed, arguments.public))
            if names == list(STAGES) and processes.primary():
                from heal_jax.summary import figures, verdict

                progress.close()
                progress.printer.print(verdict(opened.root), markup=False, soft_wrap=True)
                progress.log("result", **figures(opened.root))
    return 0


def _repositories(arguments: ExportArguments) -> dict[str, str]:
    """What is to be pushed, by its kind. Raises InputError for names that cannot be."""
    from heal_jax.share.naming import require

    asked = {"model": ("push-to-hub", arguments.push_to_hub), "dataset": ("push-dataset", arguments.push_dataset)}
    for option, name in asked.values():
        if name:
            require(name, f"--{option}")
    return {kind: name for kind, (_, name) in asked.items() if name}


def _push(run: "Run", repositories: dict[str, str], public: bool) -> None:
    from heal_jax import storage
    from heal_jax.share import hub

    for kind, name in repositories.items():
        folder = run.root / hub.FOLDERS[kind][0]
        storage.pull(folder)
        run.progress.say(f"export     pushing {storage.shown(folder)} to {name}")
        run.progress.say(f"export     pushed: {hub.push(folder, kind, name, public)}")
