"""A plan in the terminal."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.config import MAIN
from heal_jax.plan import backend
from heal_jax.plan.cost import Cost
from heal_jax.plan.estimate import Estimate
from heal_jax.plan.slices import Slice

GB = 1e9


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
    for table in (_programs(plan), _memory(plan), _work(plan), _collectives(plan), _run(plan)):
        if table.row_count:
            console.print(table)
    for e in plan.estimates:
        for warning in e.warnings:
            console.print(f"note: {e.program.name}: {warning}", soft_wrap=True, markup=False)
    console.print(
        f"Times are the least possible: peak rates, all overlapped. Assumed: {', '.join(plan.work.assumed)}.",
        soft_wrap=True,
        markup=False,
    )


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """The first `left` columns are words, the others figures."""
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i >= left)
    return table


def _programs(plan: Slice) -> Table:
    table = _table("Programs", "program", "model", "shape", left=3)
    for e in plan.estimates:
        table.add_row(e.program.name, e.program.model.name, e.program.shape)
    return table


def _memory(plan: Slice) -> Table:
    table = _table(
        f"Memory, GB a chip (of {plan.estimates[0].usable / GB:.1f} usable; other: models that wait)",
        *("program", "fits", "needs", "weights", "optimizer", "other", "cache", "temporary"),
    )
    for e in plan.estimates:
        m = e.memory
        parts = ("weights", "optimizer", "resident", "cache", "temporary")
        cells = [f"{getattr(m, part) / GB:.2f}" if m and getattr(m, part) else "-" for part in parts]
        table.add_row(e.program.name, "yes" if e.fits else "NO", f"{e.needs / GB:.2f}", *cells)
    return table


def _parts(e: Estimate) -> list[tuple[str, Cost]]:
    """What is counted of a program, with names; nothing of one that the compiler refused."""
    if e.once is None or e.step is None or e.read is None:
        return []
    if e.program.reads:
        return [("read", e.read), ("step", e.step)]
    if e.program.steps:
        return [("read", e.once), ("step", e.step)]
    return [("update" if "train" in e.program.stages else "batch", e.once)]


def _work(plan: Slice) -> Table:
    columns = ("program", "part", "TFLOP", "HBM GB", "x least", "link GB", "time", "roof")
    table = _table("Work of a chip (least: weights and cache, read once)", *columns, left=2)
    for e in plan.estimates:
        for i, (part, cost) in enumerate(_parts(e)):
            limit = e.roof(cost)
            excess = e.step_excess if part == "step" else None
            moved = _digits(cost.bytes / GB), "-" if excess is None else f"{excess:.2f}"
            figures = (_digits(cost.flops / 1e12), *moved, _digits(cost.wire / GB))
            table.add_row("" if i else e.program.name, part, *figures, _time(limit.seconds), limit.name)
    return table


def _collectives(plan: Slice) -> Table:
    table = _table("Collectives", "program", "part", "number, kind, GB of a chip", left=3)
    for e in plan.estimates:
        for part, cost in _parts(e):
            kinds = sorted((k for k in cost.payload if cost.payload[k] >= 1e3), key=lambda k: -cost.payload[k])
            said = ", ".join(f"{cost.collectives[k]:.0f} {k} {_digits(cost.payload[k] / GB)}" for k in kinds)
            if said:
                table.add_row(e.program.name, part, said)
    return table


def _run(plan: Slice) -> Table:
    columns = ["program", "calls", "time a call", "hours", "chip-hours"] + (["cost"] if plan.price else [])
    table = _table(f"Whole run: {plan.work.problems} problems, {plan.work.sets[MAIN].problems} held out", *columns)
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
