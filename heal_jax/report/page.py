"""report.html: one page that answers five questions about a run, from what its directory holds so far."""

import base64
import hashlib
import os
import string
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from heal_jax import store
from heal_jax.report import colours, figures, payload, repairs
from heal_jax.report.data import RunData, grades, load
from heal_jax.report.markup import Html, join, number, percent, points, script_json, table, tag
from heal_jax.sets import further
from heal_jax.strict import flatten, to_dict

STAGES = ("sample", "hindsight", "repair", "curate", "train", "evaluate", "export")


def write_report(root: Path) -> Path:
    """Write root/report.html and return its path. Raises InputError where root is not a run directory."""
    run = load(root)
    packed = payload.pack(run)
    sections = (
        ("Did it help?", did_it_help),
        ("Where did the data come from?", where_from),
        ("What does a repair look like?", lambda run: what_repairs(run, packed)),
        ("How did training go?", how_training),
        ("What was run?", what_ran),
    )
    body = join([header(run), tag("main", [tag("section", tag("h2", name), *make(run)) for name, make in sections])])
    # Nothing may be asked of any network, and only these three scripts run, whatever the page holds.
    browser = "".join(map(_asset, ("text.js", "payload.js", "detail.js", "browser.js")))
    scripts = [
        get_plotlyjs().replace("</script", "<\\/script"),
        _asset("draw.js"),
        f'(() => {{\n"use strict";\n{browser}}})();\n',
    ]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    text = string.Template(_asset("template.html")).substitute(
        policy=policy,
        title=tag("title", f"{root.resolve().name}: HEAL report")[len("<title>") : -len("</title>")],
        style=colours.css() + _asset("style.css") + _asset("browser.css"),
        body=body,
        plotly=scripts[0],
        draw=scripts[1],
        # The list is drawn before Plotly and the blocks are read.
        index=payload.elements([packed.index], "rollout-index"),
        browser=scripts[2],
        blocks=payload.elements(packed.blocks, "rollout-block"),
    )
    path = root / "report.html"
    store.write_text(path, text, f".{os.getpid()}")  # heal report may write it while heal run does
    return path


def _asset(name: str) -> str:
    return resources.files("heal_jax.report").joinpath(name).read_text(encoding="utf-8")


def plot(figure: figures.Figure, title: str, wide: bool = False) -> Html:
    """A figure and its data; drawn by draw.js. A wide one scrolls on small screens."""
    place = [
        tag("div", class_="plot", role="img", aria_label=title),
        tag("script", script_json(figure), type="application/json"),
    ]
    return tag("div", place, class_="wide" if wide else None)


def todo(text: str) -> Html:
    return tag("p", "Still to come: ", text, class_="todo")


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
    return tag("header", tag("h1", f"HEAL run: {run.root.resolve().name}"), tag("p", state), notes, noscript)


def did_it_help(run: RunData) -> Iterable[Html]:
    accuracy, difference = run.summary.get("accuracy"), run.summary.get("difference")
    if difference:
        yield tag("p", sentence(difference, accuracy or {}), class_="lead")
    if not accuracy:
        yield todo("the accuracies of teacher and students on held-out problems (heal evaluate).")
    else:
        names = figures.levels(accuracy)
        yield plot(figures.accuracies(run), "accuracy of the four models, 95 % intervals", wide=len(names) > 4)
        rows = []
        for model, title in figures.MODELS.items():
            found = accuracy.get(model)
            groups = [found, *(found["per_level"].get(name) for name in names)] if found else []
            rows.append([title, *map(_interval, groups)])
        if difference:
            by_level = difference.get("per_level", {})
            parts = [difference, *(by_level.get(name) for name in names)] if by_level else [difference]
            missing = [""] * (1 + len(names) - len(parts))
            rows.append(["Difference", *(_interval(part, points) for part in parts), *missing])
        sizes = next(iter(accuracy.values()))
        counts = [
            ("all", sizes["n"]),
            *((name or "no level", sizes["per_level"][name]["n"]) for name in names if name in sizes["per_level"]),
        ]
        yield table(["", *(join([name, tag("small", f" n = {n}")]) for name, n in counts)], rows)
        yield tag(
            "p",
            "Mean over problems of the share of right samples (pass@1), with 95 % bootstrap intervals over problems; "
            "n is the number of problems. The difference, HEAL minus rejection sampling in percentage points, is "
            "paired by problem.",
            class_="caption",
        )
    if others := further(run.summary):
        names = [*figures.MODELS]
        rows = [
            [
                join([title, tag("small", f" n = {found[names[0]]['n']}")]),
                *(_interval(found.get(model)) for model in names),
                _interval(found.get("difference"), points),
            ]
            for title, found in others
        ]
        yield tag("h3", "Also evaluated")
        yield table(["", *figures.MODELS.values(), "Difference"], rows)
        yield tag("p", "Further sets, and one greedy sample a problem; levels are in summary.json.", class_="caption")
    counted = grades(run.evaluation)
    if counted:
        kinds = sorted({grade for model in counted.values() for grade in model}, key=lambda g: (g != "correct", g))
        order = [*(m for m in figures.MODELS if m in counted), *(m for m in sorted(counted) if m not in figures.MODELS)]
        rows = [[figures.MODELS.get(m, m), *(number(counted[m].get(kind, 0)) for kind in kinds)] for m in order]
        yield tag("details", tag("summary", "Grades of the evaluation samples"), table(["", *kinds], rows))


def sentence(difference: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """The difference with its interval, in words."""
    mean, (low, high) = difference["mean"], difference["ci95"]
    parts = []
    if "heal" in accuracy and "rejection_sampling" in accuracy:
        ours, theirs = (percent(accuracy[name]["mean"]) for name in ("heal", "rejection_sampling"))
        parts.append(
            f"The HEAL student is right in {ours} of held-out samples, the rejection-sampling student {theirs}:"
        )
    parts.append(f"a difference of {points(mean)} points, 95 % interval {points(low)} to {points(high)}.")
    if low <= 0 <= high:
        parts.append("The interval holds 0, so this run alone does not show a difference.")
    text = " ".join(parts)
    return text[0].upper() + text[1:]


def _interval(group: Mapping[str, Any] | None, unit: Any = percent) -> Any:
    if not group or group.get("mean") is None:
        return "–"
    low, high = (unit(value).removesuffix(" %") for value in group["ci95"])
    return [unit(group["mean"]), tag("small", f"{low} to {high}")]


def where_from(run: RunData) -> Iterable[Html]:
    problems = [p for p in run.problems.values() if p["stratum"] and p["pass_rate"] is not None]
    if run.decisions and problems and run.rollouts.num_rows:
        yield plot(figures.flow(run), "flow of problems through the method", wide=True)
        yield tag(
            "p",
            "Every problem is drawn once, to the latest stage that learns from it. Unsolved problems try repairs "
            "first, then hindsight, as the other hard ones do. What leaves “right repairs” and “right answers” "
            "towards their stages is what PURE keeps; stage 1 takes correct unaided rollouts.",
            class_="caption",
        )
    elif "curate" not in run.manifest["stages"]:
        yield todo("the flow of problems to the three stages (heal hindsight, heal repair, heal curate).")
    else:
        yield tag(
            "p",
            "The flow of problems is not drawn: problems.parquet, decisions.parquet or the rollouts are not there.",
            class_="todo",
        )
    yield tag("div", *_counts(run.summary), class_="two")
    if problems:
        n, most = run.settings.sample.n, run.settings.gear.max_correct
        ceiling = sum(p["stratum"] == "unsolved" for p in problems)
        yield tag("h3", "The teacher’s ceiling")
        yield plot(figures.pass_rates(run), "histogram of the pass rates of the problems")
        yield tag(
            "p",
            f"{ceiling} of {len(problems)} problems ({percent(ceiling / len(problems))}) lie above the ceiling: at "
            f"most {most} of {n} unaided rollouts solve them. Rejection sampling learns next to nothing from these.",
            class_="caption",
        )
    else:
        yield todo("pass rates of the problems (heal sample).")


def _counts(summary: dict[str, Any]) -> Iterable[Html]:
    """The counts of the summary, as tables."""
    strata, repair, hindsight = (summary.get(name) for name in ("strata", "repair", "hindsight"))
    if strata:
        rows = [["problems", number(summary.get("problems"))], ["solved", number(strata["solved"])]]
        rows += [["hard", number(strata["hard"])], ["of these unsolved", number(strata["unsolved"])]]
        rows += [["repaired (a repair is kept)", number(repair["repaired_problems"])]] if repair else []
        yield table(["Problems", ""], rows)
    if repair or hindsight:
        names = ("problems", "candidates", "correct", "leaked", "duplicates", "kept")
        titles = {"leaked": "talk about the hint", "duplicates": "same tokens as another"}
        rows = [
            [titles.get(name, name), *(number((part or {}).get(name)) for part in (hindsight, repair))]
            for name in names
        ]
        yield table(["Aided rollouts", "hindsight", "repair"], rows)
    if summary.get("stages"):
        rows = [[f"stage {k}", number(s["examples"]), number(s["tokens"])] for k, s in summary["stages"].items()]
        yield table(["Curriculum", "examples", "tokens"], rows)


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


def how_training(run: RunData) -> Iterable[Html]:
    if not run.training:
        yield todo("the loss of both students (heal train).")
        return
    yield plot(figures.losses(run), "training loss of both students")
    rows = []
    for model in ("rejection_sampling", "heal"):
        events = [event for event in run.training if event["model"] == model]
        if events:
            last = events[-1]
            totals = [number(last.get(name)) for name in ("step", "tokens", "loss_tokens")]
            rows.append([figures.MODELS[model], *totals, number(last.get("loss"), 4), number(last.get("seconds"), 1)])
    yield table(["", "steps", "tokens", "loss tokens", "last loss", "seconds"], rows)
    yield tag(
        "p",
        "Both students start from the same weights and take the same number of optimizer steps with the same learning "
        "rates. The losses are on different examples: they say that training ran well, not which student is better.",
        class_="caption",
    )


def what_ran(run: RunData) -> Iterable[Html]:
    manifest = run.manifest
    command = manifest.get("command") or "heal run config.yaml --out NEW_DIRECTORY"
    yield tag(
        "p",
        "Command" if "command" in manifest else "To run it again, with the config below",
        ": ",
        tag("code", command),
    )
    facts = {k: v for k, v in manifest.items() if k not in ("stages", "shards", "work", "command")}
    if facts:
        yield table([], flatten(facts).items(), class_="facts-table")
    else:
        yield todo("versions, device and hashes (manifest.json).")
    seconds = run.summary.get("seconds") or {}
    rates = {k: v for k, v in (run.summary.get("throughput") or {}).items() if v}
    timed = [[name, number(value, 1)] for name, value in seconds.items()]
    if timed:
        timed.append(["all", number(sum(seconds.values()), 1)])
    speeds = [[name.replace("_tokens_per_s", ", tokens a second"), number(value, 1)] for name, value in rates.items()]
    tables = [table(["Seconds", ""], timed)] if timed else [todo("seconds of each stage.")]
    yield tag("div", tables, [table(["Throughput", ""], speeds)] if speeds else [], class_="two")
    if run.config is not None:
        rows = [[key, str(value)] for key, value in flatten(to_dict(run.config)).items()]
        yield tag("details", tag("summary", "Config"), table([], rows, class_="facts-table"))
    else:
        yield todo("the config (config.yaml).")
    if manifest["shards"]:
        rows = [[name, tag("code", digest)] for name, digest in sorted(manifest["shards"].items())]
        yield tag("details", tag("summary", "Checksums (SHA-256)"), table([], rows, class_="facts-table"))
