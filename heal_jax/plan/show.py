"""A plan in the terminal."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.plan import backend
from heal_jax.plan.cost import Cost
from heal_jax.plan.estimate import Estimate, roof
from heal_jax.plan.slices import Slice

GB = 1e9
SHORT = {
    "all-reduce": "reduce",
    "all-gather": "gather",
    "reduce-scatter": "scatter",
    "all-to-all": "to-all",
    "collective-permute": "permute",
    "ragged-all-to-all": "ragged",
}


def show(plan: Slice, console: Console) -> None:
    """Tables of memory, of work, and of the whole run."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    title = f"{plan.topology.name}, {plan.topology.chips} chips, {plan.setting}: {verdict}"
    console.print(Text(f"\n{title}", style="bold"))
    if not backend.has_libtpu():
        console.print(
            "warning: libtpu is not installed (pip install 'heal-jax[plan]'): compiled for CPU devices; memory, bytes "
            "and collectives are not the TPU's",
            soft_wrap=True,
            markup=False,
        )
    console.print(_memory(plan))
    console.print(_work(plan))
    console.print(_run(plan))
    if any(e.layers != (e.program.model.config.num_layers,) for e in plan.estimates):
        console.print("note: extrapolated from compilations with few layers; without --fast all are compiled")
    for e in plan.estimates:
        for warning in e.warnings:
            console.print(f"note: {e.program.name}: {warning}", soft_wrap=True, markup=False)
    console.print(
        f"Times are the least possible: peak rates, all overlapped. Assumed: {', '.join(plan.work.assumed)}.",
        soft_wrap=True,
        markup=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        wraps = i == 0 or column.startswith("collectives")
        table.add_column(
            column, justify="left" if i == 0 else "right", no_wrap=not wraps, min_width=16 if i == 0 else None
        )
    return table


def _memory(plan: Slice) -> Table:
    table = _table(
        f"Memory, GB a chip (of {plan.estimates[0].usable / GB:.1f} usable)",
        *("program", "model", "weights", "optimizer", "other models", "cache", "temporary", "needs", "fits"),
    )
    for e in plan.estimates:
        m = e.memory
        parts = ("weights", "optimizer", "resident", "cache", "temporary")
        cells = [f"{getattr(m, part) / GB:.2f}" if m and getattr(m, part) else "-" for part in parts]
        table.add_row(
            f"{e.program.name}: {e.program.shape}",
            e.program.model.name,
            *cells,
            f"{e.needs / GB:.2f}",
            "yes" if e.fits else "NO",
        )
    return table


def _work(plan: Slice) -> Table:
    table = _table(
        "Work of a chip", "program", "unit", "TFLOP", "GB of HBM", "collectives (number, kind, GB)", "time", "roof"
    )
    for e in plan.estimates:
        if e.once is None or e.step is None:
            table.add_row(e.program.name, *["-"] * 6)
            continue
        if e.program.steps:
            table.add_row(e.program.name, "prefill", *_cost(e.once, e))
            table.add_row("", "decode step", *_cost(e.step, e))
        else:
            table.add_row(e.program.name, "update" if e.program.stages[0] == "train" else "batch", *_cost(e.once, e))
    return table


def _cost(cost: Cost, e: Estimate) -> list[str]:
    kinds = sorted((k for k in cost.payload if cost.payload[k] >= 1e3), key=lambda k: -cost.payload[k])
    parts = [(SHORT[k], cost.collectives[k], cost.payload[k]) for k in kinds[:2]]
    if len(kinds) > 2:
        parts.append(("other", sum(cost.collectives[k] for k in kinds[2:]), sum(cost.payload[k] for k in kinds[2:])))
    said = ", ".join(f"{number:.0f} {kind} {size / GB:.2g}" for kind, number, size in parts)
    limit = roof(cost, e.chip)
    return [_digits(cost.flops / 1e12), _digits(cost.bytes / GB), said or "-", _time(limit.seconds), limit.name]


def _run(plan: Slice) -> Table:
    columns = ["program", "calls", "time a call", "hours", "chip-hours"] + (["cost"] if plan.price else [])
    table = _table(f"Whole run: {plan.work.problems} problems, {plan.work.held_out} held out", *columns)
    for e in plan.estimates:
        hours = e.chip_hours
        cells = [f"{e.program.calls:,.0f}", _time(e.seconds), _digits(hours / plan.topology.chips), _digits(hours)]
        table.add_row(e.program.name, *cells, *([_digits(hours * plan.price)] if plan.price else []))
    hours = plan.chip_hours
    total = ["total", "", "", _digits(hours / plan.topology.chips), _digits(hours)]
    table.add_row(*total, *([_digits(hours * plan.price)] if plan.price else []), style="bold")
    return table


def _digits(x: float) -> str:
    """Three significant digits."""
    if math.isnan(x):
        return "-"
    if x == 0:
        return "0"
    if x >= 100:
        return f"{x:,.0f}"
    if x < 1e-4:
        return "<0.0001"
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} us"
