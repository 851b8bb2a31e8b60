"""The plots of an ablation, as plotly figures in plain data (`heal_jax.report.figures` says how)."""

from collections.abc import Mapping
from typing import Any

from heal_jax.ablate.arms import BASELINE, WHOLE
from heal_jax.report.figures import Figure, figure, label

Found = Mapping[str, Any]


def _colour(name: str) -> str:
    return "$accent" if name == WHOLE else "$middle" if name == BASELINE else "$strong"


def differences(found: Found) -> Figure:
    """Each arm's accuracy minus the baseline's, with its interval, and the seeds by themselves."""
    names = [name for name in found["arms"] if "difference" in found["arms"][name]][::-1]
    rows = [found["arms"][name]["difference"] for name in names]
    whole = {
        "type": "scatter", "mode": "markers", "x": [100 * row["mean"] for row in rows],
        "y": [label(name) for name in names], "marker": {"size": 11, "color": [_colour(name) for name in names]},
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 2, "width": 0, "color": "$middle",
            "array": [100 * (row["ci95"][1] - row["mean"]) for row in rows],
            "arrayminus": [100 * (row["mean"] - row["ci95"][0]) for row in rows],
        },
        "hovertemplate": "%{y}: %{x:+.1f} points<extra></extra>", "showlegend": False,
    }  # fmt: skip
    seeds = {
        "type": "scatter", "mode": "markers", "showlegend": False,
        "x": [100 * x for row in rows for x in row["per_seed"]],
        "y": [label(name) for name, row in zip(names, rows) for _ in row["per_seed"]],
        "marker": {"size": 6, "symbol": "line-ns-open", "color": "$strong"},
        "hovertemplate": "%{y}, one seed: %{x:+.1f} points<extra></extra>",
    }  # fmt: skip
    return figure(
        [seeds, whole], height=90 + 30 * len(names), margin={"l": 8, "r": 12, "t": 12, "b": 48},
        xaxis={"title": "accuracy minus rejection sampling, percentage points", "zeroline": True,
               "zerolinecolor": "$strong"},
        yaxis={"showgrid": False},
    )  # fmt: skip


def costs(found: Found) -> Figure:
    """Accuracy against the teacher's tokens, an arm a mark."""
    names = list(found["arms"])
    rows = [found["arms"][name] for name in names]
    marks = {
        "type": "scatter", "mode": "markers+text", "showlegend": False,
        "x": [row["teacher_tokens"]["all"] for row in rows], "y": [100 * row["accuracy"]["mean"] for row in rows],
        "text": [label(name) if name in (WHOLE, BASELINE, "equal_tokens") else "" for name in names],
        "textposition": "top center", "customdata": [label(name) for name in names],
        "marker": {"size": 10, "color": [_colour(name) for name in names]},
        "hovertemplate": "%{customdata}: %{y:.1f} %, %{x:,} tokens<extra></extra>",
    }  # fmt: skip
    return figure(
        [marks], height=340, xaxis={"title": "tokens that the teacher decoded", "rangemode": "tozero"},
        yaxis={"ticksuffix": " %"},
    )  # fmt: skip


def pass_rates(found: Found) -> Figure:
    """How many training problems the teacher gets right how often, over all seeds."""
    teachers = found["teacher"]
    counts = [sum(values) / len(teachers) for values in zip(*(t["pass_rates"] for t in teachers))]
    bars = {
        "type": "bar", "x": list(range(len(counts))), "y": counts, "showlegend": False,
        "marker": {"color": ["$accent" if i <= 1 else "$middle" for i in range(len(counts))]},
        "hovertemplate": "%{x} right: %{y:.1f} problems<extra></extra>",
    }  # fmt: skip
    return figure(
        [bars], height=280, xaxis={"title": f"right rollouts of {teachers[0]['n']}", "showgrid": False},
        yaxis={"title": "problems"},
    )  # fmt: skip


def offsets(cuts: Found) -> Figure:
    """Flawless repairs by how many steps the cut is from the first wrong one."""
    rows = cuts["by_offset"]
    x = [int(offset) for offset in rows]
    line = {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": [100 * row["flawless"] for row in rows.values()],
        "line": {"color": "$accent", "width": 2}, "marker": {"color": "$accent", "size": 7}, "showlegend": False,
        "customdata": [[row["cuts"], row["tokens"]] for row in rows.values()],
        "hovertemplate": "%{x:+d} steps: %{y:.1f} % flawless, %{customdata[1]:.0f} tokens<extra></extra>",
    }  # fmt: skip
    return figure(
        [line], height=340, yaxis={"ticksuffix": " %", "rangemode": "tozero"},
        xaxis={"title": "steps kept beyond the first wrong one (0: all right steps kept)"},
    )  # fmt: skip


def cutting(cuts: Found) -> Figure:
    """Flawless repairs for a thousand tokens: the method's rule, its neighbours, the controls."""
    shown = ["oracle", *(f"{kind}, window {window}, backup {backup}" for kind in ("difference", "ratio", "entropy")
             for window in ("1/3", "1") for backup in (1, 0)), "first surge, backup 1", "random, window 1/3, backup 1",
             "random, window 1, backup 1", "restart"]  # fmt: skip
    names = [name for name in shown if name in cuts["rules"]][::-1]
    rows = [cuts["rules"][name]["flawless_per_1000_tokens"] for name in names]
    plain = ("oracle", "restart")
    colours = ["$accent" if name == "difference, window 1/3, backup 1" else
               "$faint" if name in plain or name.startswith("random") else "$middle" for name in names]  # fmt: skip
    bars = {
        "type": "bar", "orientation": "h", "x": [row["mean"] for row in rows], "y": [label(name, 40) for name in names],
        "marker": {"color": colours}, "showlegend": False,
        "error_x": {
            "type": "data", "symmetric": False, "color": "$strong", "thickness": 1, "width": 0,
            "array": [row["ci95"][1] - row["mean"] for row in rows],
            "arrayminus": [row["mean"] - row["ci95"][0] for row in rows],
        },
        "hovertemplate": "%{y}: %{x:.2f}<extra></extra>",
    }  # fmt: skip
    return figure([bars], height=80 + 24 * len(names), margin={"l": 8, "r": 12, "t": 12, "b": 32},
                  yaxis={"showgrid": False})  # fmt: skip
