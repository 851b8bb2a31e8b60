"""The README's picture, an SVG of the figures of a few seeds of one config:

    python -m heal_jax.report.picture configs/quickstart.yaml configs/results/quickstart-seed*.json \\
        --out configs/results/quickstart.svg
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from heal_jax.config import Config, load
from heal_jax.report import colours
from heal_jax.report.figures import MODELS
from heal_jax.store import read_json, write_text

WIDTH, TOP, ROW, SEED = 860, 84, 50, 10  # pixels: the page, above the rows, a row, between the lines of two seeds
NAMES, RIGHT = 24, 590  # left edges: names of the models, the part about training problems
PANELS, PANEL = (172, 378), 150  # left edges and width of the two panels of accuracies
BAR = 200  # a bar of all training problems

# A card with a background of its own: a page may be dark where the reader's system is light.
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--text); }
  .title { font-weight: 600; font-size: 15px; }
  .small { font-size: 12px; fill: var(--strong); }
  .number { font-weight: 600; font-variant-numeric: tabular-nums; }
  .card { fill: var(--panel); stroke: var(--line); }
  .grid { stroke: var(--line); }
  .plain { stroke: var(--middle); fill: var(--middle); }
  .heal { stroke: var(--accent); fill: var(--accent); }
  text.heal { stroke: none; }
"""


def picture(config: Config, summaries: Sequence[dict[str, Any]]) -> str:
    """SVG of `summary.json` of some seeds: accuracies with their intervals, all and of the hard level, beside how many
    training problems were solved and unsolved, and how many of the unsolved were repaired. A line is a seed.
    """
    figures = [summary["accuracy"] for summary in summaries]
    parts = [_text(NAMES, 32, "Accuracy on held-out problems", "title")]
    for x, level in zip(PANELS, (None, "hard")):
        parts += _panel(x, [{m: f[m]["per_level"][level] if level else f[m] for m in MODELS} for f in figures], level)
    for row, (model, name) in enumerate(MODELS.items()):
        parts.append(_text(NAMES, _middle(row) + 4, name, "number heal" if model == "heal" else ""))
    parts += _problems(config, summaries)
    bottom = TOP + ROW * len(MODELS)
    seeds = (
        f"A line is one of {len(summaries)} seeds: mean and 95 % interval over problems. Numbers: mean of the seeds, %."
    )
    parts.append(_text(NAMES, bottom + 38, seeds, "small"))
    height = bottom + 56
    says = "; ".join(f"{name} {_mean(figures, model):.0f} %" for model, name in MODELS.items())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">',
            f"<title>Accuracy on held-out problems: {escape(says)}</title>",
            f"<style>{colours.css()}{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _panel(x: int, figures: Sequence[dict[str, Any]], level: str | None) -> list[str]:
    """Accuracies of one level (None: all), from 0 to 100 %."""
    count = figures[0]["heal"]["n"]
    parts = [_text(x, 60, f"{count} {level} ones" if level else f"all {count}", "small")]
    bottom = TOP + ROW * len(MODELS)
    for share in (0, 0.5, 1):
        at = x + share * PANEL
        parts.append(f'<path class="grid" d="M{at:g} {TOP - 8}V{bottom}"/>')
        parts.append(_text(at, bottom + 16, f"{100 * share:.0f}", "small", "middle"))
    for row, model in enumerate(MODELS):
        look = "heal" if model == "heal" else "plain"
        for y, found in zip(_lines(row, len(figures)), figures):
            low, high = found[model]["ci95"]
            parts.append(
                f'<path class="{look}" stroke-width="2" d="M{x + low * PANEL:.1f} {y:g}H{x + high * PANEL:.1f}"/>'
            )
            parts.append(f'<circle class="{look}" r="3.5" cx="{x + found[model]["mean"] * PANEL:.1f}" cy="{y:g}"/>')
        parts.append(_text(x + PANEL + 12, _middle(row) + 4, f"{_mean(figures, model):.0f}", "number"))
    return parts


def _problems(config: Config, summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Training problems by stratum, and what became of the unsolved: bars."""
    total, n, most = summaries[0]["problems"], config.sample.n, config.gear.max_correct
    strata = [summary["strata"] for summary in summaries]
    rows = [
        (f"solved: at least half of {n} rollouts right", [s["solved"] for s in strata]),
        ("harder", [s["hard"] - s["unsolved"] for s in strata]),
        (f"unsolved: at most {most} right", [s["unsolved"] for s in strata]),
        ("of the unsolved: repaired by HEAL", [s["repair"]["repaired_problems"] for s in summaries]),
    ]
    parts = [_text(RIGHT, 32, f"The {total} training problems", "title")]
    for row, (name, counts) in enumerate(rows):
        look, top = "heal" if row == len(rows) - 1 else "plain", TOP + ROW * row
        parts.append(_text(RIGHT, top - 6, name, "small"))
        for line, count in enumerate(counts):
            y = top + 4 + line * 8
            width = BAR * count / total
            parts.append(f'<rect class="{look}" stroke="none" x="{RIGHT}" y="{y}" width="{width:.1f}" height="5"/>')
        low, high = min(counts), max(counts)
        said = f"{low}" if low == high else f"{low} to {high}"
        parts.append(_text(RIGHT + BAR * high / total + 10, top + 18, said, "number"))
    return parts


def _mean(figures: Sequence[dict[str, Any]], model: str) -> float:
    return 100 * sum(found[model]["mean"] for found in figures) / len(figures)


def _middle(row: int) -> float:
    return TOP + ROW * (row + 0.5) - 4


def _lines(row: int, seeds: int) -> list[float]:
    """The heights of a row's lines, one a seed."""
    return [_middle(row) + SEED * (line - (seeds - 1) / 2) for line in range(seeds)]


def _text(x: float, y: float, text: str, look: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" class="{look}" text-anchor="{anchor}">{escape(text)}</text>'


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=picture.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("summary", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    write_text(arguments.out, picture(load(arguments.config), [read_json(path) for path in arguments.summary]))


if __name__ == "__main__":
    main()
