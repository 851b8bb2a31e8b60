"""The stages in order."""

from collections.abc import Callable

from heal_jax.collect import hindsight, repair, sample
from heal_jax.curriculum import curate, train_students
from heal_jax.evaluate import evaluate
from heal_jax.export import export
from heal_jax.processes import once
from heal_jax.report.page import write_report
from heal_jax.run import Run
from heal_jax.summary import summarise

STAGES: dict[str, Callable[[Run], None]] = {
    "sample": sample,
    "hindsight": hindsight,
    "repair": repair,
    "curate": curate,
    "train": train_students,
    "evaluate": evaluate,
    "export": export,
}


NEEDS = {
    "hindsight": ("sample",),
    "repair": ("sample",),
    "curate": ("sample", "hindsight", "repair"),
    "train": ("curate",),
    "evaluate": ("train",),
    "export": ("train",),
}


def run_stages(run: Run, names: list[str]) -> None:
    """Do the named stages that are not done yet; summary and report after each, and at the end in any case."""
    for name in names:
        if run.directory.done(name) is None:
            STAGES[name](run)
            if name != names[-1]:
                _tell(run)
        else:
            run.progress.say(f"{name:<10} done before")
    _tell(run)


def _tell(run: Run) -> None:
    def tell() -> None:
        summarise(run)
        write_report(run.root)

    once(tell)
