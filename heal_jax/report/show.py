"""Rollouts in the terminal: a list of what there is, or one with its entropies."""

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.errors import InputError
from heal_jax.report.data import KINDS, RunData, load
from heal_jax.report.view import Scored, Step, View, view

# Shades of token entropy: black text on ever stronger blue.
SHADES = ["#f2f5fd", "#dce5fa", "#c3d3f6", "#a9bff2", "#8eaaee", "#7396ea"]
NEAREST = 2000  # ids compared with one that is not there


def show(root: Path, rollout_id: str | None, console: Console) -> None:
    """Print one rollout, or without an id what there is. Raises InputError for an unknown id or no run directory."""
    run = load(root)
    for note in run.notes:
        _print(console, Text(clean(note), style="italic"))
    if rollout_id is None:
        _list(run, console)
        return
    row = run.rollout(rollout_id)
    if row is None:
        raise InputError(f"{rollout_id}: no such rollout in {root}; {_nearest(run, rollout_id)}")
    _rollout(run, view(run, row), console)


def clean(text: str) -> str:
    """Text without what a terminal would obey: control characters are shown as a box."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else "\u2423" for c in text)


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _nearest(run: RunData, rollout_id: str) -> str:
    ids = run.rollouts["rollout_id"].to_pylist()
    if not ids:
        return "there are no rollouts yet: `heal sample` makes them"
    shared = {name: len(os.path.commonprefix([name, rollout_id])) for name in ids}
    close = sorted(ids, key=lambda name: (-shared[name], name))[:NEAREST]
    return f"did you mean {difflib.get_close_matches(rollout_id, close, n=1, cutoff=0.0)[0]}?"


def _list(run: RunData, console: Console) -> None:
    if not run.rollouts.num_rows:
        _print(console, Text("There are no rollouts yet: `heal sample` makes them."))
        return
    listing = Table("kind", "rollouts", "correct", "kept", "the first", box=None, pad_edge=False)
    outcomes = run.outcomes()
    total, correct, kept = Counter[str](), Counter[str](), Counter[str]()
    for _, kind, grade, decision in outcomes:
        total[kind] += 1
        correct[kind] += grade == "correct"
        kept[kind] += bool(decision.get("kept"))
    for kind in KINDS:
        ids = run.rollouts.filter(pc.equal(run.rollouts["kind"], kind))["rollout_id"].slice(0, 3).to_pylist()
        counts = (str(counter[kind]) for counter in (total, correct, kept))
        listing.add_row(Text(kind), *counts, Text(clean("\n".join(ids)), overflow="fold"))
    console.print(listing)
    repairs = [i for i, d in run.decisions.items() if d["kept"] and d["stage"] == 3][:5]
    if repairs:
        _print(console, Text("\nkept repairs, the first:\n" + clean("\n".join(repairs))))
    _print(console, Text("\n`heal show DIR ROLLOUT_ID` prints one."))


def _rollout(run: RunData, shown: View, console: Console) -> None:
    row = shown.row
    problem: dict[str, Any] = run.problems.get(row["problem_id"], {})
    _print(console, Text(clean(row["rollout_id"]), style="bold"))
    facts = [
        row["kind"],
        f"problem {row['problem_id']}",
        *([f"level {problem['level']}"] if problem.get("level") else []),
    ]
    facts += [f"from {row['parent_id']}"] if row["parent_id"] else []
    _print(console, Text(clean(", ".join(facts)), style="dim"))
    _part(console, "question", Text(clean(shown.question)))
    if row["kind"] == "repair":
        at = row["breakpoint_step"]
        where = "none" if at is None else f"step {at} of the failed rollout"
        _part(console, "breakpoint", Text(f"{where}; kept: {shown.kept_steps} steps, {row['kept_tokens']} tokens"))
    entropies = [t.entropy for step in shown.steps for t in step.tokens if t.entropy is not None]
    top = max([0.1, *entropies])
    kept = [step for step in shown.steps if step.kept]
    if kept:
        _part(console, "kept prefix", None)
        _steps(console, kept, top)
    if shown.hint:
        title = "hint (the teacher alone sees it)" if row["kind"] == "repair" else "what the teacher saw"
        _part(console, title, Text(clean(shown.hint.rstrip("\n")), style="italic"))
    _part(console, "continuation" if kept else "rollout", None)
    if entropies:
        ramp = [Text("  ", style=f"black on {shade}") for shade in SHADES]
        _print(console, Text.assemble("token entropy, nats: 0 ", *ramp, f" {top:.2f}"))
    elif not shown.shaded:
        _print(console, Text("(plain text: the texts of single tokens are not known)", style="dim"))
    _steps(console, [step for step in shown.steps if not step.kept], top)
    if shown.answer:
        _print(console, Text(f"{'answer':>28}   {_figures(shown.answer)}"))
    _part(
        console,
        "grade",
        Text(clean(f"{row['grade']}, answer {row['answer'] or 'none'}, true answer {problem.get('answer', '?')}")),
    )
    if row["pure_score"] is not None:
        threshold = run.settings.pure.threshold
        sign = "≤" if row["pure_score"] <= threshold else ">"
        _part(console, "PURE", Text(f"S {row['pure_score']:.3f} {sign} threshold {threshold:g}"))
    decision = run.decisions.get(row["rollout_id"])
    verdict = "not decided yet (heal curate)"
    if decision:
        verdict = f"kept, stage {decision['stage']}" if decision["kept"] else f"dropped: {decision['reason']}"
    _part(console, "verdict", Text(clean(verdict)))


def _part(console: Console, title: str, text: Text | None) -> None:
    _print(console, Text.assemble((f"\n{title}", "bold"), *((": ", text) if text else ())))


def _steps(console: Console, steps: Sequence[Step], top: float) -> None:
    """A line of figures, then the step's text."""
    for step in steps:
        entropy = f"entropy {step.entropy:.3f}" if step.entropy is not None else ""
        figures = _figures(step.scored) if step.scored else ""
        _print(console, Text(f"{step.number:>4}  {entropy:<20}  {figures}".rstrip(), style="dim"))
        line = Text("      ")
        for token in step.tokens:
            shade = (
                SHADES[min(len(SHADES) - 1, int(token.entropy / top * len(SHADES)))]
                if token.entropy is not None
                else None
            )
            line.append(clean(token.text).replace("\n", "↵"), style=f"black on {shade}" if shade else "")
        _print(console, line)


def _figures(scored: Scored) -> str:
    return f"PPL {scored.ppl:.3f}  expected {scored.expected:.3f}  ratio {scored.ratio:.3f}"
