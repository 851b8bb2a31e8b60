"""The stages in order."""

from collections.abc import Callable

from heal_jax.collect import hindsight, repair, sample
from heal_jax.curriculum import curate, train_students
from heal_jax.evaluate import evaluate
from heal_jax.export import export
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


def run_stages(run: Run, names: list[str]) -> None:
    """Do the named stages that are not done yet; summary and report after each."""
    for name in names:
        if run.directory.done(name) is None:
            STAGES[name](run)
            summarise(run)
            write_report(run.root)
        else:
            run.progress.say(f"{name:<10} done before")
