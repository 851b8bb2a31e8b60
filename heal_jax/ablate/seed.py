"""One seed of an ablation: the teacher's rollouts, which all arms share, and a run directory for each arm.

    OUT/seed0/teacher/    sample, hindsight and repair as HEAL has them; teacher and untrained student evaluated
    OUT/seed0/ARM/        curriculum, evaluation of the student; rollouts that the arm shares are links

Each is an ordinary run directory, which `heal show` reads. A student's checkpoints go when it is evaluated.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heal_jax import processes
from heal_jax.ablate import cuts, shortcuts
from heal_jax.ablate.arms import Arm
from heal_jax.collect import hindsight, repair, sample, sample_more
from heal_jax.config import MAIN, Config
from heal_jax.curriculum import curate, train_students
from heal_jax.errors import InputError
from heal_jax.evaluate import evaluate, problem_means
from heal_jax.pipeline import memory, run_stages
from heal_jax.progress import Progress
from heal_jax.run import Run, open_run
from heal_jax.sets import draw_of
from heal_jax.storage import place
from heal_jax.store import RunDirectory, digest, read_json, remove, write_json
from heal_jax.strict import override
from heal_jax.world.worlds import world_of

PATHS, REPEATS = 2, 4  # of an unsolved problem: failed rollouts that are cut everywhere, continuations of each cut
ROLLOUTS, CERTAIN = 150, 40  # right rollouts that are spoilt, and how many are asked for the answer after each step
BEFORE = ("teacher", "student_base")
REPAIRS = ("problems", "problems_kept", "candidates", "correct", "leaked", "kept")  # of what curate counted
MEASURES = "measures.json"
STUDENT = "heal"  # what the student of every arm is called in its directory


def shared(config: Config, arms: Sequence[Arm], folder: Path, measured: bool, progress: Progress) -> dict[str, Any]:
    """Make what the arms share, as far as they need it (or what is `measured`); the figures of the teacher and of the
    untrained student.
    """
    wanted = {name for arm in arms for name in arm.aided}
    if measured or any(arm.more for arm in arms):
        wanted |= {"hindsight", "repair"}
    stages: dict[str, Callable[[Run], None]] = {"sample": sample, "hindsight": hindsight, "repair": repair}
    stages = {name: stage for name, stage in stages.items() if name == "sample" or name in wanted}
    stages["evaluate"] = functools.partial(evaluate, models=BEFORE)
    with open_run(config, folder, progress, command="heal ablate") as run:
        if any(arm.variant.hinted for arm in arms) and not run.same_ids:
            raise InputError(
                "hint_left_in: the student has another tokenizer or chat template than the teacher, and cannot learn "
                "what the teacher saw; name the other arms with --arms"
            )
        run_stages(run, list(stages), stages, tell=False)
        means = {name: _means(run, name) for name in BEFORE}
        return {"means": means, "teacher": _teacher(run), "work": _work(run)}


def one(
    config: Config, arm: Arm, folder: Path, teacher: Path, untrained: np.ndarray, progress: Progress
) -> dict[str, Any]:
    """Make one arm from what is in `teacher`, and its figures: means [problems] float64 of its student; by kind of
    rollout the teacher's tokens, and the seconds for those that are its own; examples by stage; tokens trained on.
    untrained: the means of a student that there is nothing to train on.
    """
    adopted = ["sample", *(name for name in arm.aided if name != "repair" or not arm.own_repairs)]

    def more(run: Run) -> None:
        aided = RunDirectory(teacher).rollouts("hindsight"), RunDirectory(teacher).rollouts("repair")
        budgets = Counter[str]()
        for row in (row for table in aided for row in table.select(["problem_id", "entropy"]).to_pylist()):
            budgets[row["problem_id"]] += len(row["entropy"])
        with memory("sample"):
            sample_more(run, budgets)

    stages: dict[str, Callable[[Run], None]] = {"repair": repair} if arm.own_repairs else {}
    stages["curate"] = functools.partial(curate, variant=arm.variant)
    stages["train"] = functools.partial(train_students, names=[STUDENT])
    stages["evaluate"] = functools.partial(evaluate, models=[STUDENT])
    with open_run(override(config, arm.settings), folder, progress, command=f"heal ablate, {arm.name}") as run:

        def adopt() -> dict[str, Any]:
            run.directory.adopt(RunDirectory(teacher), adopted)
            variant = json.loads(json.dumps(dataclasses.asdict(arm.variant)))
            if run.directory.manifest.get("variant", variant) != variant:
                run.directory.forget("curate")
            run.directory.update(variant=variant)
            return run.directory.manifest

        run.directory.manifest = processes.once(adopt)
        if arm.more:
            more(run)
        first = [name for name in stages if name in ("repair", "curate")]
        run_stages(run, first, stages, tell=False)
        record = run.directory.manifest["stages"]
        if any(made["examples"] for made in record["curate"]["stages"].values()):
            run_stages(run, list(stages), stages, tell=False)
            trained, means = record["train"][STUDENT], _means(run, STUDENT)
        else:
            progress.say(f"{arm.name}: nothing to train on, so its student stays what it was")
            trained, means = {"tokens": 0, "loss_tokens": 0}, untrained
        processes.once(lambda: remove(place(run.root / "checkpoints")))
        return {
            "means": means,
            "tokens": decoded_tokens(run.directory),
            "work": _work(run),
            "examples": {stage: made["examples"] for stage, made in record["curate"]["stages"].items()},
            "trained": {name: trained[name] for name in ("tokens", "loss_tokens")},
            "repair": {name: record["curate"]["repair"][name] for name in REPAIRS},
        }


def measure(config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
    """Breakpoints and PURE, measured directly on the rollouts in `folder`; kept in measures.json there, with
    the checksum of the rollouts that they are of."""
    path, of = folder / MEASURES, digest(RunDirectory(folder).manifest["shards"])
    if path.is_file() and (known := read_json(path)).pop("of", None) == of:
        return known
    with open_run(config, folder, progress, command="heal ablate --measure") as run:
        found: dict[str, Any] = {}
        if world_of(config.problems.source) is not None:
            with memory("repair"):
                decoded = cuts.decode(run, PATHS, REPEATS)
            found["cuts"] = cuts.measured(decoded, config.evaluate.resamples, config.seed)
        with memory("repair"):
            found["planted"] = shortcuts.planted(run, ROLLOUTS, CERTAIN)
        found["natural"] = shortcuts.natural(run)
        processes.once(functools.partial(write_json, path, found | {"of": of}))
        processes.once(functools.partial(cuts.forget, run))
    return found


def decoded_tokens(directory: RunDirectory) -> dict[str, int]:
    """Tokens that the teacher decoded for the rollouts of a directory, by kind."""
    tokens = Counter[str]()
    for row in directory.rollouts().select(["kind", "entropy"]).to_pylist():
        tokens[row["kind"]] += len(row["entropy"])
    return dict(tokens)


def _means(run: Run, model: str) -> np.ndarray:
    return problem_means(run, model, draw_of(run.config, MAIN))


def _work(run: Run) -> dict[str, float]:
    """Seconds of the teacher's stages that were made in this directory."""
    work = run.directory.manifest.get("work", {})
    return {name: work[name]["seconds"] for name in ("sample", "hindsight", "repair") if name in work}


def _teacher(run: Run) -> dict[str, Any]:
    """How the teacher did on the training problems: pass_rates, problems by correct rollouts of `sample.n`; strata."""
    record = run.directory.manifest["stages"]["sample"]
    correct = [record["correct"].get(problem.id, 0) for problem in run.problems]
    strata = Counter(record["strata"].values())
    return {
        "problems": len(correct),
        "n": run.config.sample.n,
        "pass_rates": np.bincount(correct, minlength=run.config.sample.n + 1).tolist(),
        "strata": {name: strata[name] for name in ("solved", "hard", "unsolved")},
    }
