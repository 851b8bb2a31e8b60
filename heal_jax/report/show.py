"""`heal show DIR ROLLOUT_ID`: a rollout in the terminal, step by step, with its entropies and what PURE said."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from heal_jax.errors import InputError
from heal_jax.gear import last_candidate
from heal_jax.report.data import RunData, load
from heal_jax.report.listing import COLOURS, Filters, rollouts
from heal_jax.report.terminal import clean, say, visible
from heal_jax.report.view import Scored, Step, View, view

# Shades of token entropy, equally bright, so that a dark terminal and a light one have the same order.
SHADES = ["", *(f"#ffffff on {shade}" for shade in ("#6f6a75", "#85607a", "#a0506e", "#bd3a5c", "#d81b45"))]
BAR = 10  # columns of a step's entropy
EIGHTHS = " ▏▎▍▌▋▊▉█"
WINDOW, SURGE = "│", "▶"  # beside the steps: where the breakpoint may lie, where it is
BESIDE = 120  # columns from which on the failed rollout is beside the repaired one
INDENT = 6
NEAREST = 2000  # ids compared with one that is not there


def show(root: Path, rollout_id: str | None, console: Console) -> None:
    """Print one rollout, or without an id what there is. Raises InputError for an unknown id or no run directory."""
    if rollout_id is None:
        rollouts(root, Filters(), 0, console)
        return
    run = load(root)
    for note in run.notes:
        say(console, Text(clean(note), style="italic"))
    row = run.rollout(rollout_id)
    if row is None:
        raise InputError(f"{rollout_id}: no such rollout in {root}; {_nearest(run, rollout_id)}")
    _rollout(run, view(run, row), console)


def _nearest(run: RunData, rollout_id: str) -> str:
    ids = run.rollouts["rollout_id"].to_pylist()
    if not ids:
        return "there are no rollouts yet: `heal sample` makes them"
    shared = {name: len(os.path.commonprefix([name, rollout_id])) for name in ids}
    close = sorted(ids, key=lambda name: (-shared[name], name))[:NEAREST]
    return f"did you mean {difflib.get_close_matches(rollout_id, close, n=1, cutoff=0.0)[0]}?"


def _rollout(run: RunData, shown: View, console: Console) -> None:
    row = shown.row
    problem: dict[str, Any] = run.problems.get(row["problem_id"], {})
    parent = run.rollout(row["parent_id"]) if row["parent_id"] else None
    failed = view(run, parent) if parent else None
    say(console, Text(visible(row["rollout_id"]), style="bold"))
    say(console, Text(visible(", ".join(_facts(run, row, problem, parent))), style="dim"))
    _part(console, "question", Text(clean(shown.question)))
    entropies = [t.entropy for v in (shown, failed) if v for s in v.steps for t in s.tokens if t.entropy is not None]
    top = max([0.1, *entropies])
    highest = max([0.1, *(s.entropy for v in (shown, failed) if v for s in v.steps if s.entropy is not None)])
    if row["kind"] == "repair":
        at = row["breakpoint_step"]
        where = "none" if at is None else f"step {at} of the failed rollout"
        _part(console, "breakpoint", Text(f"{where}; kept: {shown.kept_steps} steps, {row['kept_tokens']} tokens"))
    kept = [step for step in shown.steps if step.kept]
    if kept:
        _part(console, "kept prefix", None)
        # Its entropies are the failed rollout's, which recorded them.
        recorded = failed.steps[: len(kept)] if failed else kept
        _print(console, [line for step in recorded for line in _step(step, top, highest, run, failed, shown)])
    if shown.hint:
        title = "hint (the teacher alone sees it)" if row["kind"] == "repair" else "what the teacher saw"
        _part(console, title, Text(clean(shown.hint.rstrip("\n")), style="italic"))
    rest = [line for step in shown.steps if not step.kept for line in _step(step, top, highest, run, shown, None)]
    if shown.answer:
        rest.append((0, Text.assemble((f"{'answer':>{BAR + 21}}  ", "dim"), _figures(shown.answer, run))))
    legend = _legend(console, top, bool(entropies), failed or (shown if row["kind"] == "base" else None))
    if failed is None:
        _part(console, "continuation" if kept else "rollout", None)
        say(console, legend)
        _print(console, rest)
    else:
        left = [x for s in failed.steps[len(kept) :] for x in _step(s, top, highest, run, failed, shown)]
        _print_both(console, legend, left, rest)
    if after := "".join(shown.texts[shown.after :]).strip():
        _part(console, "after the thinking part", Text(clean(after)))
    _verdict(run, row, problem, shown, console)


def _facts(run: RunData, row: dict[str, Any], problem: dict[str, Any], parent: dict[str, Any] | None) -> list[str]:
    facts = [row["kind"], f"problem {row['problem_id']}"]
    if problem:
        rate = problem.get("pass_rate")
        facts += [f"level {problem['level']}"] if problem["level"] else []
        facts.append(f"{problem['stratum']}" + ("" if rate is None else f" (pass rate {rate:.2f})"))
    facts.append(
        f"{len(row['tokens'])} tokens, {'ended by itself' if row['finish'] == 'stop' else 'cut by its length'}"
    )
    if row["parent_id"]:
        facts.append(f"from {row['parent_id']}" + (f" ({parent['grade']})" if parent else ""))
    children = run.rollouts.filter(pc.equal(run.rollouts["parent_id"], row["rollout_id"]))
    if children.num_rows:
        right = children["grade"].to_pylist().count("correct")
        facts.append(f"{children.num_rows} repairs of it, {right} correct")
    return facts


def _verdict(run: RunData, row: dict[str, Any], problem: dict[str, Any], shown: View, console: Console) -> None:
    said = f"{row['grade']}, answer {row['answer'] or 'none'}, true answer {problem.get('answer', '?')}"
    _part(console, "grade", Text(clean(said), COLOURS.get(row["grade"], "")))
    if row["pure_score"] is not None:
        spec = run.settings.pure
        sign = "≤" if row["pure_score"] <= spec.threshold else ">"
        ratios = [scored.ratio for scored in (*(s.scored for s in shown.steps), shown.answer) if scored]
        worst = f", worst ratio {max(ratios):.3f}" if ratios else ""
        passed = "green" if row["pure_score"] <= spec.threshold else "red"
        _part(console, "PURE", Text(f"S {row['pure_score']:.3f} {sign} threshold {spec.threshold:g}{worst}", passed))
    decision = run.decisions.get(row["rollout_id"])
    verdict = "not decided yet (heal curate)"
    if decision:
        verdict = f"kept, stage {decision['stage']}" if decision["kept"] else f"dropped: {decision['reason']}"
    kept = decision is not None and decision["kept"]
    _part(console, "verdict", Text(clean(verdict), "green" if kept else ""))


def _part(console: Console, title: str, text: Text | None) -> None:
    say(console, Text.assemble((f"\n{title}", "bold"), *((": ", text) if text else ())))


def _legend(console: Console, top: float, known: bool, cut: View | None) -> Text:
    """What the shades and the marks beside the steps mean."""
    if not known:
        return Text("(plain text: the texts of single tokens are not known)", style="dim")
    marks = Text(f"{WINDOW} window, {SURGE} breakpoint" if cut is not None else "", "dim")
    if console.color_system is None:
        return marks
    ramp = [Text("  ", style=shade) for shade in SHADES]
    return Text.assemble("token entropy, nats: 0 ", *ramp, f" {top:.2f}   ", marks)


Line = tuple[int, Text]  # columns that it is indented by where it is broken, and its text


def _step(step: Step, top: float, highest: float, run: RunData, of: View | None, repair: View | None) -> list[Line]:
    """A line of figures, then the step's text. repair: that of the rollout `of`, whose breakpoint is known."""
    mark = " "
    if of is not None and of.row["kind"] == "base" and 1 <= step.number <= _last(len(of.steps), run):
        mark = WINDOW
    if repair is not None and repair.row["breakpoint_step"] == step.number:
        mark = SURGE
    entropy = f"{_bar(step.entropy, highest)}  entropy {step.entropy:.3f}" if step.entropy is not None else ""
    head = Text.assemble((mark, "bold red" if mark == SURGE else "dim"), (f"{step.number:>3}  ", "dim"))
    head.append(f"{entropy:<{BAR + 15}}  ", style="dim")
    if step.scored and repair is None:
        head.append_text(_figures(step.scored, run))
    head.rstrip()
    text = Text()
    for token in step.tokens:
        shade = "" if token.entropy is None else SHADES[min(len(SHADES) - 1, int(token.entropy / top * len(SHADES)))]
        text.append(visible(token.text), style=shade)
    return [(0, head), (INDENT, text)]


def _last(steps: int, run: RunData) -> int:
    """The last step that may be the breakpoint of a rollout with so many."""
    return int(last_candidate(steps, run.settings.gear.window)[steps]) if steps > 1 else 0


def _bar(entropy: float, highest: float) -> str:
    eighths = max(1, round(entropy / highest * BAR * 8))
    return ("█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(BAR)


def _figures(scored: Scored, run: RunData) -> Text:
    """Of a step; the ratio stands out where a rollout of such steps alone would be dropped."""
    above = scored.ratio > run.settings.pure.threshold
    ratio = f"ratio {scored.ratio:.3f}", "bold red" if above else "dim"
    return Text.assemble((f"PPL {scored.ppl:.3f}  expected {scored.expected:.3f}  ", "dim"), ratio)


def _print(console: Console, lines: Sequence[Line]) -> None:
    for indent, text in lines:
        if console.is_terminal:
            console.print(Padding(text, (0, 0, 0, indent)))
        else:  # a line of the file is a line of the text
            say(console, Text(" " * indent) + text)


def _print_both(console: Console, legend: Text, failed: Sequence[Line], repaired: Sequence[Line]) -> None:
    """The failed rollout and the repaired one from the cut on, side by side where there is room."""
    if not console.is_terminal or console.width < BESIDE:
        for title, lines in (("the failed rollout, from the cut on", failed), ("continuation", repaired)):
            _part(console, title, None)
            if lines is failed:
                say(console, legend)
            _print(console, lines)
        return
    console.print()
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=2)
    grid.add_column(ratio=3)
    grid.add_row(Text("the failed rollout, from the cut on", "bold"), Text("continuation", "bold"))
    for i in range(max(len(failed), len(repaired))):
        cells = (Padding(x[i][1], (0, 0, 0, x[i][0])) if i < len(x) else "" for x in (failed, repaired))
        grid.add_row(*cells)
    say(console, legend)
    console.print(grid)
