"""What was measured, as records, as JSON and as a table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.bench.timing import median


@dataclasses.dataclass(frozen=True)
class Figure:
    """One comparison on the same work: how many times as much the other side takes as ours.

    ours, theirs: what each repeat took, seconds (or bytes, as `quantity` says). work: what one repeat does, in `unit`
    (tokens). reach: the least ratio of medians that is aimed at; None for a comparison without an aim. limit: seconds
    that the matrix products alone take at the same shapes, repeated in the same turns; empty where nobody measured it.
    flops: of those products.
    """

    name: str
    against: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    work: float = 0.0
    unit: str = "tokens/s"
    reach: float | None = None
    limit: tuple[float, ...] = ()
    flops: float = 0.0
    quantity: str = "seconds"

    @property
    def ratio(self) -> float:
        """Median of theirs over median of ours: above 1 ours takes less."""
        return median(self.theirs) / median(self.ours)

    @property
    def fraction(self) -> float:
        """Of the limit that ours comes to: 1 were its matrix products the whole of it; NaN without a limit."""
        return median(self.limit) / median(self.ours)

    @property
    def reached(self) -> bool | None:
        """Whether the aim is met; None without one."""
        return None if self.reach is None else self.ratio >= self.reach

    def rate(self, values: tuple[float, ...]) -> float:
        """Of a side, in `unit`: work a second, or the bytes themselves."""
        return self.work / median(values) if self.quantity == "seconds" else median(values)

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them; NaN as null."""
        derived = {
            "ours_rate": self.rate(self.ours),
            "theirs_rate": self.rate(self.theirs),
            "ratio": self.ratio,
            "limit_fraction": self.fraction,
            "limit_flops_per_second": self.flops / median(self.limit),
            "reached": self.reached,
        }
        every = {**dataclasses.asdict(self), **derived}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in every.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Figure":
        """What `to_json` gave, read back from a file."""
        fields: dict[str, Any] = {field.name: record[field.name] for field in dataclasses.fields(cls)}
        fields |= {name: tuple(fields[name]) for name in ("ours", "theirs", "limit")}
        return cls(**fields)


COLUMNS = ("what", "against", "unit", "ours", "theirs", "ratio", "reach", "limit")


def _cells(f: Figure) -> tuple[str, ...]:
    """Of a row of the table."""
    reach = "" if f.reach is None else f"{f.reach:.2f}"
    limit = "" if math.isnan(f.fraction) else f"{f.fraction:.0%}"
    unit, scale = ("MB", 1e6) if f.quantity == "bytes" else (f.unit.replace("tokens", "tok"), 1.0)
    sides = [digits(f.rate(values) / scale) for values in (f.ours, f.theirs)]
    return f.name, f.against, unit, *sides, f"{f.ratio:.2f}", reach, limit


def markdown(figures: Sequence[Figure]) -> str:
    """The table as the README has it; ratios that miss their aim are in italics."""
    rows = [list(COLUMNS), ["---"] * 3 + ["---:"] * 5]
    for f in figures:
        rows.append(list(_cells(f)))
        if f.reached is False:
            rows[-1][5] = f"*{rows[-1][5]}*"
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def show(figures: Sequence[Figure], console: Console) -> None:
    """The table: fits 80 columns. A missed aim is marked."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i >= 2, ratio=1 if i < 2 else None)
    for f in figures:
        cells: list[str | Text] = [*_cells(f)]
        cells[5] = Text(f"{f.ratio:.2f}", style={True: "green", False: "red", None: ""}[f.reached])
        table.add_row(*cells)
    console.print(table)
    console.print(
        "Medians. ratio: how many times as much the other side takes; reach: what is aimed at; limit: the part of our "
        "time that the matrix products alone would take.",
        soft_wrap=False,
        markup=False,
    )


def digits(x: float) -> str:
    """Three significant digits."""
    if math.isnan(x):
        return "-"
    if x == 0 or x >= 100:
        return f"{x:,.0f}"
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"
