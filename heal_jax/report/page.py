"""report.html: one page that answers six questions about a run, from what its directory holds so far."""

from collections.abc import Iterable
from pathlib import Path

from heal_jax.report import payload, repairs
from heal_jax.report.accuracy import did_it_help
from heal_jax.report.data import RunData, load
from heal_jax.report.frame import asset, write_page
from heal_jax.report.markup import Html, number, percent, points, tag, todo
from heal_jax.report.origin import where_from
from heal_jax.report.purity import is_pure_sane
from heal_jax.report.ran import what_ran
from heal_jax.report.training import how_training

STAGES = ("sample", "hindsight", "repair", "curate", "train", "evaluate", "export")


def write_report(root: Path) -> Path:
    """Write root/report.html and return its path. Raises InputError where root is not a run directory."""
    run = load(root)
    packed = payload.pack(run)
    sections = (
        ("accuracy", "Did it help?", did_it_help(run)),
        ("data", "Where did the data come from?", where_from(run)),
        ("repairs", "What does a repair look like?", what_repairs(run, packed)),
        ("pure", "Is PURE sane?", is_pure_sane(run)),
        ("training", "How did training go?", how_training(run, STAGES)),
        ("run", "What was run?", what_ran(run)),
    )
    browser = "".join(map(asset, ("text.js", "payload.js", "detail.js", "browser.js")))
    return write_page(
        root / "report.html",
        f"{root.resolve().name}: HEAL report",
        header(run),
        sections,
        # Before Plotly and the blocks are read, the browser draws its list.
        first=f'(() => {{\n"use strict";\n{browser}}})();\n',
        style=asset("browser.css"),
        index=payload.elements([packed.index], "rollout-index"),
        blocks=payload.elements(packed.blocks, "rollout-block"),
    )


def header(run: RunData) -> Html:
    done = [name for name in STAGES if name in run.manifest["stages"]]
    left = [name for name in STAGES if name not in done]
    state = (
        "Every stage is done."
        if not left
        else f"Done: {', '.join(done) or 'nothing yet'}. Still to come: {', '.join(left)}."
    )
    if run.config is None:
        state += " config.yaml could not be read: thresholds are shown as the defaults have them."
    notes = [tag("p", note, class_="todo") for note in run.notes]
    noscript = tag("noscript", tag("p", "The plots need JavaScript; the tables hold the same figures.", class_="todo"))
    title = tag("h1", f"HEAL run: {run.root.resolve().name}")
    return tag("header", title, tag("p", in_short(run), class_="lead"), tag("p", state), notes, noscript)


def in_short(run: RunData) -> str:
    """What became of the problems, in a few plain sentences; those that can be said already."""
    said = []
    strata, repair, accuracy = (run.summary.get(name) for name in ("strata", "repair", "accuracy"))
    if strata:
        most, n = run.settings.gear.max_correct, run.settings.sample.n
        said.append(
            f"Of {number(run.summary.get('problems'))} problems the teacher solves {number(strata['solved'])}, and "
            f"leaves {number(strata['unsolved'])} unsolved (at most {most} of {n} tries right)."
        )
    if repair:
        repaired = repair["repaired_problems"]
        every = strata and 0 < repaired == strata["unsolved"]
        said.append(f"HEAL repaired {'all' if every else number(repaired)} of these.")
    if accuracy and "heal" in accuracy:
        heal, difference = accuracy["heal"], run.summary.get("difference")
        text = f"On {number(heal['n'])} held-out problems its student is right in {percent(heal['mean'])} of samples"
        if difference:
            low, high = difference["ci95"]
            text += (
                f": {points(difference['mean'])} points against rejection sampling, 95 % interval {points(low)} to "
                f"{points(high)}"
            )
        said.append(f"{text}.")
    return " ".join(said) or "Nothing is there to tell yet."


def what_repairs(run: RunData, packed: payload.Payload) -> Iterable[Html]:
    if not run.rollouts.num_rows:
        yield todo("rollouts of the teacher, and repairs of the failed ones (heal sample, heal repair).")
        return
    if not packed.examples:
        none = "repair" in run.manifest["stages"]
        yield tag("p", "There are no repairs to show.") if none else todo("repairs of failed rollouts (heal repair).")
    yield tag(
        "p",
        "A repair keeps the first steps of a failed rollout, up to the cut before the step where the teacher’s entropy "
        "surges; the teacher alone is then shown a hint and goes on. PURE looks at the new steps without the hint: a "
        "ratio well above 1 means that the teacher would not have gone there by itself. Line A is the answer, scored "
        "as one more step.",
    )
    if packed.left_out:
        yield tag("p", packed.left_out, class_="todo")
    yield Html(asset("browser.html"))
    yield repairs.without_script(run, packed.examples)
