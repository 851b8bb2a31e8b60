"""All seeds and arms, one after another or some at a time; what is done is kept, and the same command goes on."""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import jax

from heal_jax import processes
from heal_jax.ablate import seed as seeds
from heal_jax.ablate.arms import BASELINE, Arm
from heal_jax.ablate.jobs import opened
from heal_jax.ablate.page import FILE, write_page
from heal_jax.ablate.results import ablation
from heal_jax.config import MAIN, Config
from heal_jax.errors import InputError, one_line
from heal_jax.processors import threads
from heal_jax.progress import Progress
from heal_jax.sets import load_set
from heal_jax.shapes import bucket
from heal_jax.store import write_json

TEACHER, MEASURES = -2, -1  # parts of a seed that are no arm


def ablate(
    config: Config, arms: Sequence[Arm], count: int, out: Path, progress: Progress, measure: bool = False, jobs: int = 1
) -> dict[str, Any]:
    """Make the arms with seeds config.seed to config.seed + count - 1, and write ablation.json and report.html.

    measure: also measure breakpoints and PURE directly, on the first seed's rollouts. jobs: arms at a time. Raises
    InputError where the batches of arms could differ, and as `heal run` does.
    """
    _comparable(config, out)
    _together(jobs)
    problems = load_set(config, MAIN)
    of_seed = [dataclasses.replace(config, seed=config.seed + number) for number in range(count)]
    folders = [out / f"seed{each.seed}" for each in of_seed]
    measured = measure or (folders[0] / "teacher" / seeds.MEASURES).is_file()
    parts = [(number, part) for number in range(count) for part in (TEACHER, MEASURES, *range(len(arms)))]
    parts = [(number, part) for number, part in parts if part != MEASURES or (measured and number == 0)]
    total = len(parts)
    if jobs > 1:
        parts.sort(key=lambda which: which[1] != TEACHER)  # what else waits for
    done: dict[tuple[int, int], Any] = {}
    fuller = (out / FILE).is_file()
    baseline = next((i for i, arm in enumerate(arms) if arm.name == BASELINE), None)  # "none" is without

    def call(number: int, part: int) -> Sequence[Any]:
        each, folder = of_seed[number], folders[number]
        if part == TEACHER:
            return seeds.shared, each, arms, folder / "teacher", measure and number == 0
        if part == MEASURES:
            return seeds.measure, each, folder / "teacher"
        before = done[number, TEACHER]["means"]["student_base"]
        return seeds.one, each, arms[part], folder / arms[part].name, folder / "teacher", before

    def named(number: int, part: int) -> str:
        what = {TEACHER: "the teacher", MEASURES: "breakpoints and PURE, measured directly"}
        said = what.get(part) or f"{arms[part].name} ({part + 1}/{len(arms)})"
        return f"seed {of_seed[number].seed} ({number + 1}/{count}): {said}"

    def write(seeds_made: int) -> dict[str, Any]:
        made = {
            arm.name: [done[n, i] for n in range(seeds_made) if (n, i) in done] for i, arm in enumerate(arms)
        }  # fmt: skip
        teachers = [done[n, TEACHER] for n in range(seeds_made)]
        found = ablation(config, problems, arms, teachers, made) | done.get((0, MEASURES), {})
        processes.once(functools.partial(_write, out, found, progress))
        return found

    running: dict[Future[Any], tuple[int, int]] = {}
    with opened(min(jobs, total), progress) as submit:
        while parts or running:
            ready = [(number, part) for number, part in parts if part == TEACHER or (number, TEACHER) in done]
            for which in ready[: jobs - len(running)]:
                parts.remove(which)
                progress.say(named(*which))
                running[submit(*call(*which))] = which
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, part = which = running.pop(future)
                done[which] = future.result()
                if jobs > 1:
                    progress.say(f"{named(*which)}: done, {len(done)} of {total}")
                # Later seeds make means over more seeds only when all arms have them; what an earlier call wrote has
                # more.
                if number == 0 and part >= 0 and baseline is not None and (0, baseline) in done and not fuller:
                    write(1)
    return write(count)


def _together(jobs: int) -> None:
    threads()
    if jobs > 1 and (processes.count() > 1 or jax.default_backend() != "cpu"):
        raise InputError(f"--jobs {jobs}: for CPUs and a run of one process; leave it out here")


def _write(out: Path, found: dict[str, Any], progress: Progress) -> None:
    write_json(out / FILE, found)
    try:
        write_page(out)
    except Exception as error:  # a page is no reason to lose a run
        progress.say(f"note: {out / 'report.html'}: not written ({one_line(error)})")


def _comparable(config: Config, out: Path) -> None:
    if str(out).startswith("gs:"):
        raise InputError(f"--out {out}: arms share rollouts by links; give a folder on a disk")
    if (out / "manifest.json").exists():
        raise InputError(f"--out {out}: the directory of a run; give one of its own")
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
