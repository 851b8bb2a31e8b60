"""The stages in order."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from heal_jax.collect import hindsight, repair, sample
from heal_jax.curriculum import STUDENTS, curate, train_students
from heal_jax.errors import RunError, one_line, out_of_memory
from heal_jax.evaluate import evaluate
from heal_jax.export import export
from heal_jax.processes import once
from heal_jax.report.page import write_report
from heal_jax.run import Run
from heal_jax.storage import place
from heal_jax.store import remove
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


# `curate` takes what is there: a run may be cut short and trained on all the same.
NEEDS = {
    "hindsight": ("sample",),
    "repair": ("sample",),
    "train": ("curate",),
    "evaluate": ("train",),
    "export": ("train",),
}

# What a stage's memory depends on.
_ROLLOUTS = "lower sample.batch, set sample.cache_tokens or sample.cache_dtype: int8"
KNOBS = {
    "sample": _ROLLOUTS,
    "hindsight": f"{_ROLLOUTS}, or lower pure.batch",
    "repair": f"{_ROLLOUTS}, or lower pure.batch",
    "train": "raise train.accumulate, set train.remat: block, lower train.batch",
    "evaluate": _ROLLOUTS,
}


def run_stages(
    run: Run, names: list[str], stages: Mapping[str, Callable[[Run], None]] = STAGES, tell: bool = True
) -> None:
    """Do the named stages that are not done yet, and before them those whose files were damaged; summary and report
    after each, and at the end in any case (where `tell`). A stage whose inputs have changed since it was begun is done
    again.
    """
    again = [name for name in run.again if name in stages and _before(name, names[-1])]
    names = [name for name in STAGES if name in names or name in again]
    for name in names:
        directory = run.directory
        if directory.outdated(name):
            _start_over(run, name)
        if directory.done(name) is None:
            directory.begin(name)
            with memory(name), run.progress.stage(name):
                stages[name](run)
            if tell and name != names[-1]:
                _tell(run)
        else:
            run.progress.say(f"{name:<10} done before")
    if tell:
        _tell(run)


def _before(name: str, last: str) -> bool:
    order = list(STAGES)
    return order.index(name) < order.index(last)


def _start_over(run: Run, name: str) -> None:
    """Forget what a stage made from other inputs: rollouts are kept under another name, trainings are removed."""
    run.progress.say(f"{name:<10} is done again: what it is made from has changed")
    if name in ("hindsight", "repair"):
        run.directory.forget(name, shards=lambda shard: shard.startswith(f"rollouts/{name}-"))
    elif name == "evaluate":

        def of_student(shard: str) -> bool:
            folder, _, file = shard.rpartition("/")
            return folder.split("/")[0] == "evaluation" and file.rpartition("-")[0] in STUDENTS

        run.directory.forget(name, shards=of_student)
    else:
        run.directory.forget(name)
    if name == "train":
        run.log("train_anew")
        for student in STUDENTS:
            run.directory.manifest.get("work", {}).pop(f"train {student}", None)
        once(lambda: remove(place(run.root / "checkpoints")))


@contextlib.contextmanager
def memory(stage: str) -> Iterator[None]:
    """Say what to change where memory runs out."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED:").split())[:200] or "no more memory"
        advice = f"{KNOBS[stage]}, or split" if stage in KNOBS else "split"
        raise RunError(
            f"{stage}: out of memory ({reason}); {advice} the model over more devices (mesh.fsdp, mesh.tensor), "
            "in a run with another --out"
        ) from error


def _tell(run: Run) -> None:
    def tell() -> None:
        summarise(run)
        try:
            write_report(run.root)
        except Exception as error:  # of whatever kind: a page is no reason to lose a run
            reason = one_line(error) or type(error).__name__
            run.progress.say(f"note: report.html was not written ({reason}); `heal report {run.root}` writes it")

    once(tell)
