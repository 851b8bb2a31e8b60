"""The plots, as plotly figures in plain data: each is a function of a run.

Colours are names such as "$accent"; the page puts in those of its light or dark scheme. Text from files is escaped,
since plotly reads a few tags in labels. Elsewhere, as in a notebook:

    run = heal_jax.report.data.load(Path("runs/quickstart"))
    plotly.graph_objects.Figure(figures.resolve(figures.flow(run)))
"""

import html
import itertools
from collections import Counter
from typing import Any

from heal_jax.pace import SOLVED_RATE
from heal_jax.report.colours import resolve as resolve
from heal_jax.report.data import RunData

MODELS = {"teacher": "Teacher", "student_base": "Student before", "rejection_sampling": "Rejection sampling",
          "heal": "HEAL"}  # fmt: skip
COLOURS = {"teacher": "$strong", "student_base": "$faint", "rejection_sampling": "$middle", "heal": "$accent"}
SYMBOLS = {"teacher": "diamond", "student_base": "circle-open", "rejection_sampling": "square", "heal": "circle"}
LEVELS = ("easy", "medium", "hard")
STRATA = ("solved", "hard", "unsolved")

Figure = dict[str, Any]


def label(text: object, most: int = 24) -> str:
    """Text as plotly shows it; long names would push others off an axis."""
    plain = str(text)
    return html.escape(plain if len(plain) <= most else plain[: most - 1] + "…", quote=False)


def _figure(data: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    axes = {name: _axis(axis) for name, axis in layout.items() if name.startswith(("xaxis", "yaxis"))}
    base = {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "$text"},
        "hoverlabel": {"bgcolor": "$panel", "bordercolor": "$line", "font": {"color": "$text"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "dragmode": False,
    }
    return {"data": data, "layout": base | layout | axes}


def _axis(axis: dict[str, Any]) -> dict[str, Any]:
    if "title" in axis:
        axis = axis | {"title": {"text": axis["title"], "font": {"size": 13, "color": "$strong"}}}
    quiet = {"gridcolor": "$line", "zeroline": False, "linecolor": "$line", "automargin": True, "fixedrange": True}
    return quiet | axis


def levels(accuracy: dict[str, Any]) -> list[str]:
    """Levels in the summary's order, those of the built-in world from easy to hard; none where there is only ""."""
    names = list(dict.fromkeys(name for figures in accuracy.values() for name in figures.get("per_level", {})))
    rank = {name: i for i, name in enumerate(LEVELS)}
    return [] if names == [""] else sorted(names, key=lambda name: rank.get(name, len(LEVELS)))


def accuracies(run: RunData) -> Figure:
    """Mean and 95 % interval of the four models, overall and by level."""
    accuracy = run.summary.get("accuracy", {})
    names = levels(accuracy)
    traces = []
    for model, title in MODELS.items():
        if model not in accuracy:
            continue
        groups = [accuracy[model], *(accuracy[model]["per_level"].get(name) for name in names)]
        shown = [(x, group) for x, group in enumerate(groups) if group and group["mean"] is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [x for x, _ in shown],
                "y": [100 * group["mean"] for _, group in shown],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (group["ci95"][1] - group["mean"]) for _, group in shown],
                    "arrayminus": [100 * (group["mean"] - group["ci95"][0]) for _, group in shown],
                    "color": COLOURS[model],
                    "thickness": 2,
                    "width": 0,
                },
                "marker": {
                    "color": COLOURS[model],
                    "symbol": SYMBOLS[model],
                    "size": 10,
                    "line": {"width": 2, "color": COLOURS[model]},
                },
                "hovertemplate": f"{title}: %{{y:.1f}} %<extra></extra>",
            }
        )
    return _figure(
        traces,
        height=340,
        scattermode="group",
        scattergap=0.25,
        xaxis={
            "tickvals": list(range(len(names) + 1)),
            "ticktext": ["all", *(label(name or "no level", 14) for name in names)],
            "range": [-0.5, len(names) + 0.5],
            "showgrid": False,
        },
        yaxis={"range": [-5, 105], "ticksuffix": " %", "title": "accuracy"},
    )


def pass_rates(run: RunData) -> Figure:
    """How many problems have each number of correct unaided rollouts, and where unsolved and solved begin."""
    problems = [p for p in run.problems.values() if p["stratum"] and p["pass_rate"] is not None]
    n, max_correct = run.settings.sample.n, run.settings.gear.max_correct
    names = {"unsolved": "$accent", "hard": "$middle", "solved": "$faint"}
    traces = []
    for name, colour in names.items():
        counts = Counter(round(p["pass_rate"] * n) for p in problems if p["stratum"] == name)
        traces.append(
            {
                "type": "bar",
                "name": name,
                "x": sorted(counts),
                "y": [counts[k] for k in sorted(counts)],
                "width": 0.85,
                "marker": {"color": colour},
                "hovertemplate": f"%{{y}} problems with %{{x}} of {n} correct ({name})<extra></extra>",
            }
        )
    solved_from = SOLVED_RATE * n - 0.5
    names_at = [
        (-0.5, 1.09, f"unsolved: at most {max_correct}", "left"),
        ((max_correct + 0.5 + solved_from) / 2, 1, "hard", "center"),
        ((solved_from + n + 0.5) / 2, 1, "solved", "center"),
    ]
    return _figure(
        traces,
        height=280,
        barmode="stack",
        showlegend=False,
        margin={"l": 48, "r": 12, "t": 48, "b": 40},
        xaxis={"range": [-0.6, n + 0.6], "title": f"correct of {n} rollouts", "showgrid": False},
        yaxis={"title": "problems", "rangemode": "tozero"},
        shapes=[_line(max_correct + 0.5, 1.09), _line(solved_from, 1.0)],
        annotations=[_note(x, text, anchor, y) for x, y, text, anchor in names_at],
    )


def _line(x: float, top: float = 1.0) -> dict[str, Any]:
    """A vertical dotted line."""
    line = {"color": "$middle", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": top, "yref": "paper", "line": line}


def _note(x: float, text: str, anchor: str, y: float = 1.0) -> dict[str, Any]:
    """Text above the plot."""
    place = {"x": x, "xanchor": anchor, "y": y, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    return place | {"text": text, "font": {"size": 12, "color": "$strong"}}


def flow(run: RunData) -> Figure:
    """Problems through the method: each is drawn once, to the latest stage that learns from it."""
    links = problem_flow(run)
    titles = {
        "problems": "problems", "solved": "solved", "hard": "hard", "unsolved": "unsolved",
        "repair": "repair", "repair-pure": "right repairs",
        "hindsight": "hindsight", "hindsight-pure": "right answers",
        "stage 1": "stage 1", "stage 2": "stage 2", "stage 3": "stage 3", "nothing": "no example",
    }  # fmt: skip
    through: Counter[str] = Counter()
    for (source, target), count in links.items():
        through[target] += count
        if source == "problems":
            through[source] += count
    names = [name for name in titles if through[name]]
    accented = {"unsolved", "repair", "repair-pure", "stage 3"}
    data = {
        "type": "sankey",
        "arrangement": "snap",
        "node": {
            "label": [f"{titles[name]}<br>{through[name]:,}" for name in names],
            "color": ["$accent" if name in accented else "$middle" for name in names],
            "pad": 26,
            "thickness": 12,
            "line": {"width": 0},
            "hovertemplate": "%{value} problems<extra></extra>",
        },
        "link": {
            "source": [names.index(source) for source, _ in links],
            "target": [names.index(target) for _, target in links],
            "value": list(links.values()),
            "color": ["$accentveil" if {source, target} <= accented else "$veil" for source, target in links],
            "hovertemplate": "%{value} problems<extra></extra>",
        },
        "textfont": {"size": 13, "color": "$text"},
    }
    return _figure([data], height=380, margin={"l": 8, "r": 8, "t": 16, "b": 16})


def problem_flow(run: RunData) -> dict[tuple[str, str], int]:
    """{(from, to): problems}. Unsolved problems try repairs first, then hindsight as the other hard ones do."""
    tried: set[tuple[str, str]] = set()
    right: set[tuple[str, str]] = set()
    stages: set[tuple[str, int]] = set()
    for problem, kind, grade, decision in run.outcomes():
        tried.add((problem, kind))
        if grade == "correct" and decision.get("reason") != "talks about the hint":
            right.add((problem, kind))
        if decision.get("kept"):
            stages.add((problem, decision["stage"]))
    links: Counter[tuple[str, str]] = Counter()
    for name, row in run.problems.items():
        if row["stratum"] not in STRATA:
            continue
        path = ["problems", row["stratum"]]
        for kind, stage in (("repair", 3), ("hindsight", 2), ("base", 1)):
            if kind != "base":
                path += [kind] if (name, kind) in tried else []
                path += [f"{kind}-pure"] if (name, kind) in right else []
            if (name, stage) in stages:
                path.append(f"stage {stage}")
                break
        else:
            path.append("nothing")
        links.update(itertools.pairwise(path))
    return dict(links)


def losses(run: RunData) -> Figure:
    """Training loss of both students; dotted lines where HEAL's phases change."""
    training = run.training
    traces = []
    for model in ("rejection_sampling", "heal"):
        events = [event for event in training if event["model"] == model]
        if events:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(events) > 1 else "markers",
                    "name": MODELS[model],
                    "x": [event["step"] for event in events],
                    "y": [event.get("loss") for event in events],
                    "line": {"color": COLOURS[model], "width": 2},
                    "marker": {"color": COLOURS[model]},
                    "text": [label(event.get("phase", "")) for event in events],
                    "hovertemplate": f"{MODELS[model]}, step %{{x}} (%{{text}}): %{{y:.4f}}<extra></extra>",
                }
            )
    heal = [event for event in training if event["model"] == "heal"]
    changes = [(a["step"], b.get("phase")) for a, b in itertools.pairwise(heal) if a.get("phase") != b.get("phase")]
    if heal:
        changes.insert(0, (0, heal[0].get("phase")))
    return _figure(
        traces,
        height=340,
        margin={"l": 48, "r": 12, "t": 72, "b": 40},
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
        xaxis={"title": "optimizer step", "rangemode": "tozero", "showgrid": False},
        yaxis={"title": "loss, nats a token", "rangemode": "tozero"},
        shapes=[_line(x) for x, _ in changes],
        annotations=[_note(x, label(phase), "left") for x, phase in changes],
    )
