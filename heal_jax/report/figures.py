"""The plots, as plotly figures in plain data: each is a function of a run.

Colours are names such as "$accent"; the page puts in those of its light or dark scheme. Text from files is escaped,
since plotly reads a few tags in labels. Elsewhere, as in a notebook:

    run = heal_jax.report.data.load(Path("runs/quickstart"))
    plotly.graph_objects.Figure(figures.resolve(figures.flow(run)))
"""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from heal_jax.pace import SOLVED_RATE
from heal_jax.report import numbers
from heal_jax.report.colours import resolve as resolve
from heal_jax.report.data import RunData

MODELS = {"teacher": "Teacher", "student_base": "Student before", "rejection_sampling": "Rejection sampling",
          "heal": "HEAL"}  # fmt: skip
COLOURS = {"teacher": "$strong", "student_base": "$faint", "rejection_sampling": "$middle", "heal": "$accent"}
SYMBOLS = {"teacher": "diamond", "student_base": "circle-open", "rejection_sampling": "square", "heal": "circle"}
LEVELS = ("easy", "medium", "hard")
KINDS = {"base": "unaided", "hindsight": "hindsight", "repair": "repairs"}
STUDENTS = ("rejection_sampling", "heal")
# Of the flow, in the order in which they are drawn.
NODES = {
    "problems": "problems", "solved": "solved", "hard": "hard", "unsolved": "unsolved",
    "repair": "repair", "repair-right": "right repairs", "repair-pure": "PURE keeps",
    "hindsight": "hindsight", "hindsight-right": "right answers", "hindsight-pure": "PURE keeps",
    "stage 1": "stage 1", "stage 2": "stage 2", "stage 3": "stage 3", "nothing": "no example",
    "open": "not decided yet",
}  # fmt: skip
# Figures of metrics.jsonl: title, unit, factor.
CURVES = {
    "loss": ("Training loss", "nats a token", 1),
    "accuracy": ("Accuracy on the dev problems", "%", 100),
    "grad_norm": ("Gradient norm before clipping", "", 1),
    "learning_rate": ("Learning rate", "", 1),
    "tokens_per_second": ("Speed", "tokens a second", 1),
    "mfu": ("Model FLOPs utilisation", "%", 100),
}
TICKS = {"learning_rate": "~e", "tokens_per_second": ","}

Figure = dict[str, Any]


def label(text: object, most: int = 24) -> str:
    """Text as plotly shows it; long names would push others off an axis."""
    plain = str(text)
    return html.escape(plain if len(plain) <= most else plain[: most - 1] + "…", quote=False)


def figure(data: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    """A figure in the report's manner."""
    axes = {name: axis(given) for name, given in layout.items() if name.startswith(("xaxis", "yaxis"))}
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


def axis(given: dict[str, Any]) -> dict[str, Any]:
    if "title" in given:
        given = given | {"title": {"text": given["title"], "font": {"size": 13, "color": "$strong"}}}
    quiet = {"gridcolor": "$line", "zeroline": False, "linecolor": "$line", "automargin": True, "fixedrange": True}
    return quiet | given


def levels(accuracy: dict[str, Any]) -> list[str]:
    """Levels in the summary's order, those of the built-in world from easy to hard; none where there is only ""."""
    names = list(dict.fromkeys(name for figures in accuracy.values() for name in figures.get("per_level", {})))
    rank = {name: i for i, name in enumerate(LEVELS)}
    return [] if names == [""] else sorted(names, key=lambda name: rank.get(name, len(LEVELS)))


def accuracies(run: RunData) -> Figure:
    """Mean and 95 % interval of the four models, overall and by level."""
    accuracy = run.summary.get("accuracy", {})
    names = levels(accuracy)
    groups = {model: [found, *(found["per_level"].get(name) for name in names)] for model, found in accuracy.items()}
    return _intervals(["all", *(label(name or "no level", 14) for name in names)], groups)


def by_teacher(run: RunData) -> Figure:
    """Mean and 95 % interval of the four models on the evaluation problems that the teacher solves, finds hard, leaves
    unsolved."""
    found = numbers.by_teacher(run)
    groups = {model: [part.get(model) for part in found.values()] for model in MODELS}
    return _intervals([f"{name} by teacher" if len(found) == 1 else name for name in found], groups)


def _intervals(names: Sequence[str], groups: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> Figure:
    """A mark with its interval for each model and each of `names`; `groups`: each model's figures, in their order."""
    traces = []
    for model, title in MODELS.items():
        shown = [(x, group) for x, group in enumerate(groups.get(model, [])) if group and group["mean"] is not None]
        if not shown:
            continue
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
    return figure(
        traces,
        height=340,
        scattermode="group",
        scattergap=0.25,
        margin={"l": 48, "r": 12, "t": 12, "b": 32},
        xaxis={
            "tickvals": list(range(len(names))),
            "ticktext": list(names),
            "range": [-0.5, len(names) - 0.5],
            "showgrid": False,
        },
        yaxis={"range": [-5, 105], "ticksuffix": " %"},
    )


def sampled(run: RunData) -> list[dict[str, Any]]:
    """The problems whose unaided rollouts are there."""
    return [p for p in run.problems.values() if p["stratum"] and p["pass_rate"] is not None]


def hits(problems: Sequence[Mapping[str, Any]], n: int) -> Counter[int]:
    """How many problems have each number of correct rollouts of n."""
    return Counter(round(p["pass_rate"] * n) for p in problems)


def pass_rates(run: RunData) -> Figure:
    """How many problems have each number of correct unaided rollouts, and where unsolved and solved begin."""
    problems = sampled(run)
    n, max_correct = run.settings.sample.n, run.settings.gear.max_correct
    names = {"unsolved": "$accent", "hard": "$middle", "solved": "$faint"}
    traces = []
    for name, colour in names.items():
        counts = hits([p for p in problems if p["stratum"] == name], n)
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
    return figure(
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
    links = numbers.problem_flow(run)
    through: Counter[str] = Counter()
    for (source, target), count in links.items():
        through[target] += count
        if source == "problems":
            through[source] += count
    names = [name for name in NODES if through[name]]
    accented = {"unsolved", "repair", "repair-right", "repair-pure", "stage 3"}
    data = {
        "type": "sankey",
        "arrangement": "snap",
        "node": {
            "label": [f"{NODES[name]}<br>{through[name]:,}" for name in names],
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
    return figure([data], height=380, margin={"l": 8, "r": 8, "t": 16, "b": 16})


def scores(run: RunData) -> Figure:
    """How the PURE scores of each kind of rollout are distributed: of right ones on both sides of the threshold, and,
    as a line, of unaided ones that are not right."""
    several, threshold = numbers.scores(run), run.settings.pure.threshold
    if not several:
        return figure([], height=120)
    edges = numbers.score_bins(several, threshold)
    middles = [*((edges[:-1] + edges[1:]) / 2).tolist(), float(edges[-1] + (edges[1] - edges[0]) / 2)]
    hover = [f"{a:.3f} to {b:.3f}" for a, b in zip(edges[:-1], edges[1:], strict=True)] + [f"over {edges[-1]:.3f}"]
    traces: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    notes = []
    drawn = 150 * len(several)  # pixels
    for i, (kind, found) in enumerate(several.items()):
        axis = f"y{i + 1}" if i else "y"
        right = numbers.binned(found.right, edges)
        shared = {"x": middles, "yaxis": axis, "customdata": hover, "showlegend": not i}
        for name, colour, keep in (("PURE keeps", "$accent", True), ("PURE drops", "$middle", False)):
            y = [int(n) if (middle < threshold) == keep else None for n, middle in zip(right, middles, strict=True)]
            traces.append(
                {
                    "type": "bar",
                    "name": f"right, S {'≤' if keep else '>'} {threshold:g}",
                    "legendgroup": name,
                    "y": y,
                    "marker": {"color": colour},
                    "hovertemplate": "%{y:,} right with S %{customdata}<extra></extra>",
                    **shared,
                }  # fmt: skip
            )
        if len(found.other):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": "not right",
                    "y": numbers.binned(found.other, edges).tolist(),
                    "line": {"color": "$text", "width": 1.25, "shape": "hvh"},
                    "hovertemplate": "%{y:,} not right with S %{customdata}<extra></extra>",
                    **shared,
                }  # fmt: skip
            )
        bottom, top = 1 - (i + 1) / len(several), 1 - i / len(several) - 34 / drawn
        axes[f"yaxis{i + 1}" if i else "yaxis"] = {"domain": [bottom, top], "rangemode": "tozero", "nticks": 4}
        notes.append(_note(0, KINDS[kind], "left", top) | {"xref": "paper"})
    return figure(
        traces,
        height=drawn + 52,
        barmode="overlay",
        bargap=0,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        xaxis={
            "title": f"PURE score S; the last bar: over {edges[-1]:g}",
            "showgrid": False,
            "anchor": f"y{len(several)}" if len(several) > 1 else "y",
            "range": [edges[0], middles[-1] * 2 - edges[-1]],
        },
        shapes=[_line(threshold)],
        annotations=[*notes, _note(threshold, f" threshold {threshold:g}", "left", 1 - 34 / drawn)],
        **axes,
    )  # fmt: skip


def losses(run: RunData) -> Figure:
    """Training loss of both students; dotted lines where HEAL's phases change."""
    return training(run, "loss", height=340)


def training_points(run: RunData, model: str, name: str, most: int = 400) -> list[tuple[int, float]]:
    """(step, value) of one of CURVES, `most` at most of those of training steps."""
    return numbers.dev(run, model) if name == "accuracy" else numbers.curve(run, model, name, most)


def training(run: RunData, name: str, height: int = 240) -> Figure:
    """One of CURVES for both students by optimizer step; dotted lines where HEAL's phases begin."""
    _, unit, factor = CURVES[name]
    traces = []
    positive: list[float] = []
    for model in STUDENTS:
        points = [(step, factor * y) for step, y in training_points(run, model, name)]
        positive += [y for _, y in points if y > 0]
        if points:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if name == "accuracy" else "lines" if len(points) > 1 else "markers",
                    "name": MODELS[model],
                    "x": [step for step, _ in points],
                    "y": [y for _, y in points],
                    "line": {"color": COLOURS[model], "width": 2},
                    "marker": {"color": COLOURS[model], "size": 8},
                    "hovertemplate": f"{MODELS[model]}, step %{{x}}: %{{y:.4~g}}<extra></extra>",
                }
            )
    axis: dict[str, Any] = {"rangemode": "tozero", "tickformat": TICKS.get(name, "")}
    # Students of small worlds learn their examples by heart: losses fall by orders of magnitude.
    if name in ("loss", "grad_norm") and positive and max(positive) > 100 * min(positive):
        axis = {"type": "log", "dtick": 1, "tickformat": ".0e"}
    begins = numbers.phases(run, "heal")
    return figure(
        traces,
        height=height,
        margin={"l": 48, "r": 12, "t": 52, "b": 40},
        legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"},
        xaxis={"title": "optimizer step", "rangemode": "tozero", "showgrid": False},
        yaxis={"title": unit, **axis},
        shapes=[_line(phase.first - 1) for phase in begins],
        # "stage 1", "1+2", "1+2+3": they stand close together on a phone.
        annotations=[
            _note(phase.first - 1, label(phase.name.removeprefix("stage ") if i else phase.name), "left")
            for i, phase in enumerate(begins)
        ],
    )
