"""report.html of an ablation, and its table in the terminal, from ablation.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from heal_jax.ablate import direct, figures
from heal_jax.ablate.arms import HINTS, WHOLE
from heal_jax.report import figures as of_runs
from heal_jax.report.frame import write_page as write
from heal_jax.report.markup import Html, number, percent, plot, points, table, tag
from heal_jax.report.numbers import STRATA
from heal_jax.store import read_json

FILE = "ablation.json"
WIDE = 110  # columns that the whole table needs in the terminal


def write_page(out: Path) -> Path:
    """Write out/report.html. Raises InputError where ablation.json is damaged."""
    found = read_json(out / FILE)
    sections = [("parts", "What is each part worth?", parts(found))]
    if len(found["arms"]) > 1:
        sections.append(("cost", "What does it cost?", cost(found)))
    if hinted := [arm.name for arm in HINTS if arm.name in found["arms"]]:
        of_arms = {name: made for name, made in found["arms"].items() if name == WHOLE or name in hinted}
        sections.append(("hint", "What does the hint cost?", hints(found["config"]["gear"]["hint"], of_arms)))
    sections.append(("teacher", "What can the teacher do?", teacher(found)))
    if found.get("cuts", {}).get("rollouts"):
        sections.append(("entropy", "Is entropy informative, and does it pay?", direct.entropy(found["cuts"])))
    if "planted" in found:
        sections.append(("pure", "Does PURE separate?", direct.purity(found["planted"], found["natural"])))
    return write(out / "report.html", f"{out.resolve().name}: HEAL ablation", header(out, found), sections)


def header(out: Path, found: dict[str, Any]) -> Html:
    config, seeds = found["config"], found["seeds"]
    said = (
        f"{config['problems']['source']}, teacher {config['teacher']['path']}, student {config['student']['path']}; "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, the same rollouts, initial weights, optimizer steps and held-out "
        "problems for all arms."
    )
    return tag("header", tag("h1", f"HEAL ablation: {out.resolve().name}"), tag("p", said, class_="lead"))


def parts(found: dict[str, Any]) -> Iterable[Html]:
    if len(found["arms"]) > 1:
        yield plot(figures.differences(found), "difference of each arm to rejection sampling")
    before = next(iter(found["before"].values()))
    levels = [name for name in of_runs.levels(found["before"]) if name in before["per_level"]]
    rows: list[list[Any]] = []
    for name, made in {**found["before"], **found["arms"]}.items():
        of_levels = [made["accuracy"]["per_level"] if "accuracy" in made else made["per_level"]][0]
        row = [tag("span", name, title=made.get("what")), _interval(made.get("accuracy", made), percent)]
        row += [percent(of_levels[level]["mean"]) for level in levels]
        rows.append([*row, *(_interval(made.get(key), points) for key in ("difference", "heal_minus"))])
    yield table(["", "all", *levels, "minus rejection sampling", "HEAL minus this"], rows)
    yield tag(
        "p",
        f"Mean over {before['n']} problems and {len(found['seeds'])} seeds of the share of right samples, with 95 % "
        "intervals from resampling problems and seeds; differences are paired by both.",
        class_="caption",
    )
    strata = [name for name in STRATA if name in before["per_stratum"]]
    if len(found["arms"]) > 1:
        rows = [
            [name, *(_interval(made["difference"]["per_stratum"][part], points) for part in strata)]
            for name, made in found["arms"].items()
            if "difference" in made
        ]
        yield tag("h3", "The same differences, by what the teacher can do")
        yield table(["", *(f"{part} ({before['per_stratum'][part]['n']})" for part in strata)], rows)
        yield tag(
            "p",
            "Held-out problems by the teacher’s unaided samples: solved, at least half right; unsolved, next to none.",
            class_="caption",
        )
    yield tag("dl", [[tag("dt", name), tag("dd", made["what"])] for name, made in found["arms"].items()])


def cost(found: dict[str, Any]) -> Iterable[Html]:
    yield plot(figures.costs(found), "accuracy of each arm against the tokens of its teacher")
    rows = []
    for name, made in found["arms"].items():
        examples = " + ".join(number(count) for count in made["examples"].values() if count)
        over = made["per_problem"].get("over_baseline", {})
        rows.append(
            [
                name, number(made["teacher_tokens"]["all"]), number(made["teacher_seconds"]), examples,
                number(made["loss_tokens"]), number(made["per_problem"]["over_student_base"]["tokens"]),
                number(over.get("tokens")),
            ]
        )  # fmt: skip
    heads = ["", "teacher tokens", "seconds", "examples by stage", "loss tokens", "tokens a problem", "beyond baseline"]
    yield table(heads, rows)
    yield tag(
        "p",
        "Tokens a problem: the teacher’s tokens for each held-out problem more that the student solves than before "
        "training; beyond baseline: what an arm costs more than rejection sampling for each problem more than that "
        "solves. A dash: it solves none more. Tokens that are read and not decoded (prompts, PURE) are not counted; "
        "seconds hold compiling, where an arm was the first to need a program.",
        class_="caption",
    )


def hints(default: str, arms: dict[str, Any]) -> Iterable[Html]:
    """arms: by name, HEAL with its hint (`default`) and with others."""
    rows = []
    for name, made in arms.items():
        repairs = made["repairs"]
        rows.append(
            [
                made["what"].removeprefix("hint: ") if name != WHOLE else default.strip(),
                percent(repairs["correct"] / max(1, repairs["candidates"])),
                percent(repairs["leaked"] / max(1, repairs["correct"])), number(repairs["kept"]),
                number(repairs["problems_kept"]), _interval(made["accuracy"], percent),
            ]
        )  # fmt: skip
    yield table(["the hint", "right repairs", "of these talk about it", "kept", "problems", "accuracy"], rows)
    yield tag("p", "Repairs that talk about the hint are dropped (gear.leak_patterns).", class_="caption")


def teacher(found: dict[str, Any]) -> Iterable[Html]:
    yield plot(figures.pass_rates(found), "problems by right rollouts of the teacher")
    of_seeds = found["teacher"]
    few = [sum(t["pass_rates"][:2]) / t["problems"] for t in of_seeds]
    solved = [t["strata"]["unsolved"] for t in of_seeds]
    repaired = found["arms"].get(WHOLE, {}).get("repairs", {}).get("problems_kept")
    said = (
        f"At most one right of {of_seeds[0]['n']}: {percent(sum(few) / len(few))} of the training problems "
        f"({number(sum(solved) / len(solved), 1)} of {of_seeds[0]['problems']})"
    )
    yield tag("p", said + (f"; HEAL repaired {number(repaired)} of them." if repaired is not None else "."))


def _interval(group: dict[str, Any] | None, unit: Any) -> Any:
    if group is None:
        return "–"
    low, high = (unit(value).removesuffix(" %") for value in group["ci95"])
    return [unit(group["mean"]), tag("small", f"{low} to {high}")]


def in_terminal(found: dict[str, Any], width: int) -> Table:
    """The arms, a line each; with levels and examples where `width` columns hold them."""
    shown = Table(box=None, pad_edge=False)
    levels = of_runs.levels(found["before"]) if width >= WIDE else []
    shown.add_column("arm", no_wrap=True)
    more = ("examples", "loss tokens") if width >= WIDE else ()
    for head in ("accuracy", *levels, "minus baseline, 95 %", "teacher tokens", *more):
        shown.add_column(head, justify="right", no_wrap=True)
    for name, made in {**found["before"], **found["arms"]}.items():
        accuracy, row = made.get("accuracy", made), [name]
        row += [f"{part['mean']:.1%}" for part in (accuracy, *(accuracy["per_level"][level] for level in levels))]
        if name in found["arms"]:
            difference = made.get("difference")
            row.append("baseline" if difference is None else (
                f"{difference['mean']:+.1%} [{difference['ci95'][0]:+.1%}, {difference['ci95'][1]:+.1%}]"
            ))  # fmt: skip
            row.append(f"{made['teacher_tokens']['all']:,}")
            if more:
                examples = "+".join(str(count) for count in made["examples"].values() if count)
                row += [examples, f"{made['loss_tokens']:,}"]
        shown.add_row(*row)
    return shown
