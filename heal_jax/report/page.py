"""report.html: one page that answers six questions about a run, from what its directory holds so far."""

import base64
import hashlib
import os
import string
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from plotly.offline import get_plotlyjs

from heal_jax import store
from heal_jax.report import colours, payload, repairs
from heal_jax.report.accuracy import did_it_help
from heal_jax.report.data import RunData, load
from heal_jax.report.markup import Html, join, number, percent, points, tag, todo
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
    contents = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections]
    body = join(
        [
            tag("a", "Skip to the first answer", href="#accuracy", class_="skip"),
            header(run),
            tag("nav", tag("ol", contents), aria_label="Contents"),
            tag("main", [tag("section", tag("h2", title), *made, id=name) for name, title, made in sections]),
        ]
    )
    # Nothing may be asked of any network, and only these scripts run, whatever the page holds; the browser first:
    # its list is drawn before Plotly and the blocks are read.
    browser = "".join(map(_asset, ("text.js", "payload.js", "detail.js", "browser.js")))
    scripts = [
        f'(() => {{\n"use strict";\n{browser}}})();\n',
        get_plotlyjs().replace("</script", "<\\/script"),
        _asset("draw.js"),
        _asset("copy.js"),
    ]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    text = string.Template(_asset("template.html")).substitute(
        policy=policy,
        title=tag("title", f"{root.resolve().name}: HEAL report")[len("<title>") : -len("</title>")],
        style=colours.css() + _asset("style.css") + _asset("browser.css"),
        body=body,
        index=payload.elements([packed.index], "rollout-index"),
        scripts=join(tag("script", Html(script)) for script in scripts),
        blocks=payload.elements(packed.blocks, "rollout-block"),
    )
    path = root / "report.html"
    store.write_text(path, text, f".{os.getpid()}")  # heal report may write it while heal run does
    return path


def _asset(name: str) -> str:
    return resources.files("heal_jax.report").joinpath(name).read_text(encoding="utf-8")


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
    yield Html(_asset("browser.html"))
    yield repairs.without_script(run, packed.examples)
