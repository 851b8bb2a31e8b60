"""Pictures of a run for notebooks. Needs matplotlib: pip install 'heal-jax[notebook]'.

Pictures are PNG, since viewers of notebooks (GitHub's is one) take styles and scripts out of HTML.
"""

import io
import textwrap
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from heal_jax.errors import InputError
from heal_jax.gear import last_candidate
from heal_jax.pace import SOLVED_RATE
from heal_jax.report.colours import SCHEMES
from heal_jax.report.data import RunData
from heal_jax.report.figures import COLOURS, MODELS, levels
from heal_jax.report.view import Step, View, view

LIGHT = SCHEMES["light"]
ACCENT, STRONG, MIDDLE, FAINT = (LIGHT[name] for name in ("accent", "strong", "middle", "faint"))
MARK, BAND = "#c2410c", "#fdeee2"  # what to look at in a rollout, whose shades are blue
STUDENTS = {name: LIGHT[colour.removeprefix("$")] for name, colour in COLOURS.items()}
STRATA = {"unsolved": ACCENT, "hard": MIDDLE, "solved": FAINT}
WIDE = 62  # columns of a rollout's text; longer lines are broken
MOST = 120  # lines of a rollout that are drawn
CHARACTER, LINE, SIZE = 0.0752, 0.19, 9  # inches of a column and of a line, points of the font


class Picture:
    """A matplotlib figure that a notebook shows as PNG. `figure` may be changed, or saved with figure.savefig(path)."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn, small = io.BytesIO(), io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a box stands for it
            self.figure.savefig(drawn, format="png", dpi=150)
        Image.open(drawn).convert("RGB").quantize(128).save(small, "png", optimize=True)  # a fifth of the bytes
        width = round(100 * self.figure.get_figwidth())
        return {"image/png": small.getvalue(), "text/plain": "<Picture>"}, {"image/png": {"width": width}}


def rollout(run: RunData, rollout_id: str) -> Picture:
    """A rollout step by step: each token on a shade of its entropy, and a bar for each step's entropy.

    Of an unaided rollout that was repaired also the window, the breakpoint and the cut (DESIGN section 2); of a repair
    the kept prefix, the hint and PURE's ratio of each step. Raises InputError where there is no such rollout.
    """
    row = run.rollout(rollout_id)
    if row is None:
        raise InputError(f"{rollout_id}: no such rollout in {run.root}")
    shown = view(run, row)
    repairs = run.rollouts.filter(pc.equal(run.rollouts["parent_id"], rollout_id)).slice(0, 1).to_pylist()
    sheet = _Sheet(shown, run.settings.pure.threshold)
    if row["kind"] == "base" and repairs:
        window = int(last_candidate(len(shown.steps), run.settings.gear.window)[-1])
        sheet.failure(shown, repairs[0], window)
    else:
        sheet.steps(shown)
    return sheet.picture(_title(run, shown))


def _title(run: RunData, shown: View) -> str:
    row, problem = shown.row, run.problems.get(shown.row["problem_id"], {})
    parts = [{"base": "Unaided rollout"}.get(row["kind"], row["kind"].capitalize()), f"graded {row['grade']}"]
    parts += [f"answer {row['answer'] or 'none'}"]
    parts += [f"true answer {problem['answer']}"] if problem and row["grade"] != "correct" else []
    parts += [f"S = {row['pure_score']:.3f}"] if row["pure_score"] is not None and row["kind"] != "base" else []
    decision = run.decisions.get(row["rollout_id"])
    if decision and row["kind"] != "base":
        parts.append(f"kept for stage {decision['stage']}" if decision["kept"] else f"dropped: {decision['reason']}")
    return ", ".join(parts)


class _Sheet:
    """Lines of text and bars on one pair of axes, in columns and lines."""

    WIDTH = 20  # of the longest bar

    def __init__(self, shown: View, threshold: float):
        lines = [line for step in shown.steps for line in _lines(step)]
        self.bars = 6 + max([40, *(sum(_width(text) for text, _ in line) for line in lines)])
        entropies = sorted(t.entropy for step in shown.steps for t in step.tokens if t.entropy is not None)
        self.top = max([0.1, *entropies[-1:]])
        self.longest = max([1e-6, *(step.entropy for step in shown.steps if step.entropy is not None)])
        self.scored = shown.row["kind"] != "base" and shown.row["step_ppl"] is not None
        self.threshold = threshold
        self.columns = self.bars + self.WIDTH + (17 if self.scored else 26)
        self.artists: list[Any] = []  # functions of the axes, drawn in order
        self.y = 0
        self.window = False  # whether it is drawn

    def failure(self, shown: View, repair: dict[str, Any], window: int) -> None:
        """The window, the breakpoint and the cut, as a repair of it recorded them."""
        self.window = True
        at, cut = repair["breakpoint_step"], sum(s < (repair["kept_tokens"] or 0) for s in shown.row["step_starts"])
        for step in shown.steps:
            if step.number == cut:
                steps = f"{cut} step{'s' * (cut != 1)}" if cut else "nothing"
                self.rule(f"cut: {steps} kept")
            note = ""
            if step.number == at and step.entropy is not None:
                before = shown.steps[step.number - 1].entropy or 0.0
                note = f"◀ breakpoint, {step.entropy - before:+.2f}"
            if not self.step(step, note, band=1 <= step.number <= window):
                return

    def steps(self, shown: View) -> None:
        for step in shown.steps:
            if shown.hint and step.number == shown.kept_steps:
                self.hint(shown)
            if not self.step(step):
                return
        if shown.hint and shown.kept_steps == len(shown.steps):
            self.hint(shown)
        if shown.answer is not None and self.scored:
            self.text(0, "answer", STRONG, weight="bold")
            self.ratio(shown.answer.ratio)
            self.y += 1

    def hint(self, shown: View) -> None:
        name = "hint, for the teacher alone" if shown.row["kind"] == "repair" else "what the teacher saw"
        for line in _broken(f"{name}: {' '.join(shown.hint.split())}", self.bars - 6):
            self.text(4, line, MARK, style="italic")
            self.y += 1

    def step(self, step: Step, note: str = "", band: bool = False) -> bool:
        """A step's lines; False where there is no more room for it."""
        lines = _lines(step)
        if self.y + len(lines) > MOST:
            self.text(4, "… the rest is left out", MIDDLE)
            self.y += 1
            return False
        if band:
            self.box(self.bars - 0.5, self.y, self.WIDTH + 1, len(lines), BAND)
        self.text(0, f"{step.number:>2}", MIDDLE)
        if step.entropy is not None:
            length = self.WIDTH * step.entropy / self.longest
            self.box(self.bars, self.y + 0.15, length, 0.7, MARK if note else ACCENT)
            self.text(self.bars + length + 0.6, f"{step.entropy:.2f} {note}".rstrip(), MARK if note else STRONG)
        elif step.kept:
            self.text(self.bars, "kept", MIDDLE)
        if step.scored is not None and self.scored:
            self.ratio(step.scored.ratio)
        for line in lines:
            x = 4.0
            for text, entropy in line:
                width = _width(text)
                if entropy is not None:
                    shade = colormaps["Blues"](0.65 * min(1.0, max(0.0, entropy) / self.top))
                    self.box(x, self.y + 0.02, width, 0.96, shade)
                self.text(x, text, MIDDLE if step.kept else "black")
                x += width
            self.y += 1
        return True

    def ratio(self, ratio: float) -> None:
        bad = ratio > self.threshold
        self.text(self.columns - 9, f"{ratio:6.2f}", MARK if bad else STRONG, weight="bold" if bad else "normal")

    def rule(self, text: str) -> None:
        y, end = self.y + 0.5, self.bars - 2
        self.artists.append(lambda axes: axes.plot([0, end - len(text) - 1], [y, y], color=MARK, lw=1, ls="--"))
        self.text(end - len(text), text, MARK)
        self.y += 1

    def text(self, x: float, text: str, colour: str, **style: Any) -> None:
        y = self.y + 0.5
        self.artists.append(lambda axes: axes.text(x, y, text, color=colour, va="center_baseline", **FONT, **style))

    def box(self, x: float, y: float, width: float, height: float, colour: Any) -> None:
        self.artists.append(lambda axes: axes.add_patch(Rectangle((x, y), width, height, fc=colour, lw=0)))

    def picture(self, title: str) -> Picture:
        heads = [
            (0.0, "step"),
            (6.0, f"tokens by entropy, 0 to {self.top:.2f} nats"),
            (self.bars, "mean, nats" + "; shaded: the window" * self.window),
            *([(self.columns - 9.0, "ratio")] if self.scored else []),
        ]
        above = _broken(title, self.columns)
        lines = self.y + len(above) + 1.4
        figure = Figure(figsize=(self.columns * CHARACTER, lines * LINE), facecolor="white")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(-1, self.columns), ylim=(self.y + 0.3, -len(above) - 1.1))
        axes.axis("off")
        for i, line in enumerate(above):
            axes.text(0, i - len(above) - 0.5, line, va="center_baseline", weight="bold", **FONT)
        for x, head in heads:
            axes.text(x, -0.5, head, color=MIDDLE, va="center_baseline", **FONT)
        for artist in self.artists:
            artist(axes)
        return Picture(figure)


# Text is taken as it is: a dollar sign begins no formula.
FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": SIZE, "parse_math": False}


def _lines(step: Step) -> list[list[tuple[str, float | None]]]:
    """A step's tokens as lines of at most WIDE columns. Newlines can be seen, and end a line that something follows."""
    lines: list[list[tuple[str, float | None]]] = [[]]
    used = 0
    pieces = [(c, t.entropy) for t in step.tokens for c in _pieces(t.text)]
    for i, (text, entropy) in enumerate(pieces):
        if lines[-1] and used + _width(text) > WIDE:
            lines.append([])
            used = 0
        lines[-1].append((text, entropy))
        used += _width(text)
        if text == "↵" and any(later != "↵" for later, _ in pieces[i + 1 :]) and pieces[i + 1][0] != "↵":
            lines.append([])
            used = 0
    return lines


def _pieces(text: str) -> list[str]:
    """A token's text without control characters, cut at newlines and where it is longer than a line."""
    plain = "".join("↵" if c == "\n" else c if c.isprintable() else "\u2423" for c in text)
    parts = [part for line in plain.replace("↵", "\n↵\n").split("\n") if line for part in _cut(line)]
    return parts


def _cut(line: str) -> list[str]:
    return [line[i : i + WIDE] for i in range(0, len(line), WIDE)]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def _broken(text: str, wide: int = WIDE) -> list[str]:
    plain = "".join(c if c.isprintable() else "\u2423" for c in text)
    return textwrap.wrap(plain, wide, max_lines=4, placeholder=" …") or [""]


def _axes(width: float = 7.5, height: float = 2.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e9f0")
    return figure, axes


def _need(there: Any, what: str, stage: str) -> None:
    if not there:
        raise InputError(f"there are no {what} yet: stage {stage} makes them")


def pass_rates(run: RunData) -> Picture:
    """How many problems have each number of correct unaided rollouts. Raises InputError before stage sample."""
    problems = [problem for problem in run.problems.values() if problem["pass_rate"] is not None]
    _need(problems, "pass rates", "sample")
    n, most = run.settings.sample.n, run.settings.gear.max_correct
    figure, axes = _axes()
    below = [0] * (n + 1)
    says = {"unsolved": f"at most {most}", "hard": f"below {SOLVED_RATE:.0%}", "solved": f"{SOLVED_RATE:.0%} and above"}
    for stratum, colour in STRATA.items():
        counts = Counter(round(p["pass_rate"] * n) for p in problems if p["stratum"] == stratum)
        heights = [counts[k] for k in range(n + 1)]
        label = f"{stratum} ({says[stratum]}): {sum(heights)}"
        axes.bar(range(n + 1), heights, 0.85, bottom=below, color=colour, label=label)
        below = [a + b for a, b in zip(below, heights)]
    axes.set(xlabel=f"correct of {n} rollouts", ylabel="problems")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return Picture(figure)


def scores(run: RunData) -> Picture:
    """PURE scores S of right rollouts: unaided ones, repairs, and where the threshold lies. Scores above 2 are in the
    last bar. Raises InputError before stage repair."""
    columns = (run.rollouts[name].to_pylist() for name in ("kind", "grade", "pure_score"))
    found = [(kind, s) for kind, grade, s in zip(*columns) if grade == "correct" and s is not None]
    parts = {name: [s for kind, s in found if kind == name] for name in ("base", "repair")}
    _need(parts["repair"], "scored repairs", "repair")
    figure, axes = _axes()
    edges = [0.9 + 0.02 * i for i in range(56)]
    for (name, label), colour in zip((("base", "unaided"), ("repair", "repairs")), (MIDDLE, ACCENT)):
        values = [min(max(s, edges[0]), edges[-1] - 1e-6) for s in parts[name]]
        weights = [100 / max(1, len(values))] * len(values)
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.6, label=f"right {label}: {len(values):,}")
    threshold = run.settings.pure.threshold
    axes.axvline(threshold, color=STRONG, lw=1, ls=":", label=f"threshold {threshold:g}: kept up to here")
    axes.set(xlabel="PURE score S", ylabel="% of each", yscale="symlog")
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.legend(frameon=False)
    return Picture(figure)


def losses(run: RunData) -> Picture:
    """Training loss of both students; dotted lines where HEAL's stages change. Raises InputError before stage train."""
    _need(run.training, "training losses", "train")
    figure, axes = _axes()
    for model in ("rejection_sampling", "heal"):
        events = [e for e in run.training if e["model"] == model and e.get("loss") is not None]
        if events:
            axes.plot([e["step"] for e in events], [e["loss"] for e in events], color=STUDENTS[model], lw=1.6,
                      label=MODELS[model])  # fmt: skip
    heal = [e for e in run.training if e["model"] == "heal"]
    for i, event in enumerate(heal):
        before = heal[i - 1] if i else {"step": 0}
        if event.get("phase") != before.get("phase"):
            axes.axvline(before["step"], color=MIDDLE, lw=0.8, ls=":")
            axes.text(before["step"], 1.0, f" {event.get('phase', '')}", transform=axes.get_xaxis_transform(),
                      va="bottom", size=9, color=STRONG, parse_math=False)  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", xlim=(0, None), yscale="log")
    axes.legend(frameon=False)
    return Picture(figure)


def accuracies(run: RunData) -> Picture:
    """Accuracy of teacher and students on held-out problems, with 95 % intervals. Raises InputError before evaluate."""
    accuracy: dict[str, Any] = run.summary.get("accuracy", {})
    _need(accuracy, "accuracies", "evaluate")
    names = levels(accuracy)
    figure, axes = _axes(height=3.2)
    models = [model for model in MODELS if model in accuracy]
    for i, model in enumerate(models):
        groups: Sequence[Any] = [accuracy[model], *(accuracy[model]["per_level"].get(name) for name in names)]
        shown = [(x, group) for x, group in enumerate(groups) if group and group["mean"] is not None]
        means = [100 * group["mean"] for _, group in shown]
        spread = [[m - 100 * g["ci95"][0] for m, (_, g) in zip(means, shown)],
                  [100 * g["ci95"][1] - m for m, (_, g) in zip(means, shown)]]  # fmt: skip
        at = [x + (i - (len(models) - 1) / 2) * 0.2 for x, _ in shown]
        axes.bar(at, means, 0.18, color=STUDENTS[model], label=MODELS[model])
        axes.errorbar(at, means, spread, fmt="none", ecolor=STRONG, elinewidth=1)
    axes.set_xticks(range(len(names) + 1), ["all", *(name or "no level" for name in names)], parse_math=False)
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return Picture(figure)
