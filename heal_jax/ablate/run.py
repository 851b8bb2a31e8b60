"""All seeds and arms, one after another; what is done is kept, and the same command goes on."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heal_jax import processes
from heal_jax.ablate import seed as seeds
from heal_jax.ablate.arms import Arm
from heal_jax.ablate.page import FILE, write_page
from heal_jax.ablate.results import ablation
from heal_jax.config import MAIN, Config
from heal_jax.errors import InputError
from heal_jax.progress import Progress
from heal_jax.sets import load_set
from heal_jax.shapes import bucket
from heal_jax.store import write_json


def ablate(
    config: Config, arms: Sequence[Arm], count: int, out: Path, progress: Progress, measure: bool = False
) -> dict[str, Any]:
    """Make the arms with seeds config.seed to config.seed + count - 1, and write ablation.json and report.html.

    measure: also measure breakpoints and PURE directly, on the first seed's rollouts. Raises InputError where the
    batches of arms could differ, and as `heal run` does.
    """
    _comparable(config, out)
    problems = load_set(config, MAIN)
    teachers: list[dict[str, Any]] = []
    made: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    measures: dict[str, Any] = {}
    fuller = (out / FILE).is_file()

    def write() -> dict[str, Any]:
        found = ablation(config, problems, arms, teachers, made) | measures
        processes.once(functools.partial(_write, out, found))
        return found

    for number in range(count):
        of_seed = dataclasses.replace(config, seed=config.seed + number)
        folder, said = out / f"seed{of_seed.seed}", f"seed {of_seed.seed} ({number + 1}/{count})"
        progress.say(f"{said}: the teacher")
        teachers.append(seeds.shared(of_seed, arms, folder / "teacher", progress, measure and number == 0))
        if number == 0 and (measure or (folder / "teacher" / seeds.MEASURES).is_file()):
            progress.say(f"{said}: breakpoints and PURE, measured directly")
            measures = seeds.measure(of_seed, folder / "teacher", progress)
        for i, arm in enumerate(arms):
            progress.say(f"{said}: {arm.name} ({i + 1}/{len(arms)})")
            before = teachers[-1]["means"]["student_base"]
            made[arm.name].append(seeds.one(of_seed, arm, folder / arm.name, folder / "teacher", before, progress))
            # Later seeds make means over more seeds only when all arms have them; what an earlier call wrote has more.
            if number == 0 and not fuller:
                write()
    return write()


def _write(out: Path, found: dict[str, Any]) -> None:
    write_json(out / FILE, found)
    with contextlib.suppress(OSError):
        write_page(out)


def _comparable(config: Config, out: Path) -> None:
    if str(out).startswith("gs:"):
        raise InputError(f"--out {out}: arms share rollouts by links; give a folder on a disk")
    if config.evaluate.dev.problems.source:
        raise InputError(
            "evaluate.dev: checkpoints that are chosen on dev problems favour arms of more stages; ablate without it"
        )
    if config.train.row_tokens < bucket(config.train.max_tokens):
        raise InputError(
            f"train.row_tokens: {config.train.row_tokens} may be less than an example has (train.max_tokens: "
            f"{config.train.max_tokens}), and the rows of some arms would be longer; set it to "
            f"{bucket(config.train.max_tokens)} or more"
        )
