"""`heal show DIR`: which rollouts there are."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.report.data import KINDS, RunData, load
from heal_jax.report.terminal import clean, say, visible

COLOURS = {"correct": "green", "wrong": "red", "truncated": "yellow", "unparsable": "magenta", "timeout": "yellow"}


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which rollouts; None: all. kept: that a stage has; dropped: that none has, as far as `curate` has decided."""

    kind: str | None = None
    grade: str | None = None
    problem: str | None = None
    stratum: str | None = None
    kept: bool = False
    dropped: bool = False


def rollouts(root: Path, filters: Filters, limit: int, console: Console) -> None:
    """Print how many there are of each kind, or where there are filters the rollouts that pass, `limit` at most (0:
    all). Raises InputError where there is no run directory.
    """
    run = load(root)
    for note in run.notes:
        say(Console(stderr=True, highlight=False), Text(clean(note), style="italic"))  # stdout is for the list
    if not run.rollouts.num_rows:
        say(console, Text("There are no rollouts yet: `heal sample` makes them."))
    elif filters == Filters():
        _summary(run, console)
    else:
        _list(run, chosen(run, filters), limit, console)


def chosen(run: RunData, filters: Filters) -> pa.Table:
    """The rows that pass, in order."""
    table = run.rollouts
    for column, wanted in (("kind", filters.kind), ("grade", filters.grade), ("problem_id", filters.problem)):
        if wanted is not None:
            table = table.filter(pc.equal(table[column], pa.scalar(wanted, pa.string())))
    if filters.stratum is not None:
        strata = ("hard", "unsolved") if filters.stratum == "hard" else (filters.stratum,)
        within = [name for name, problem in run.problems.items() if problem["stratum"] in strata]
        table = table.filter(pc.is_in(table["problem_id"], pa.array(within, pa.string())))
    if filters.kept or filters.dropped:
        ids = [name for name, decision in run.decisions.items() if decision["kept"] == filters.kept]
        table = table.filter(pc.is_in(table["rollout_id"], pa.array(ids, pa.string())))
    return table


def _list(run: RunData, table: pa.Table, limit: int, console: Console) -> None:
    """One line a rollout: its id first and in one piece, so that it can be picked out."""
    if not table.num_rows:
        say(console, Text("No rollout passes these filters; `heal show DIR` counts what there is."))
        return
    rows = table.slice(0, limit or None).select(["rollout_id", "grade", "pure_score", "tokens"]).to_pylist()
    wide = max(len(visible(row["rollout_id"])) for row in rows)
    for row in rows:
        decision = run.decisions.get(row["rollout_id"])
        verdict = "" if decision is None else f"stage {decision['stage']}" if decision["kept"] else decision["reason"]
        score = "" if row["pure_score"] is None else f"S {row['pure_score']:.3f}"
        parts = [
            Text(f"{visible(row['rollout_id']):<{wide}}  "),
            Text(f"{visible(row['grade']):<10}  ", COLOURS.get(row["grade"], "")),
            Text(f"{len(row['tokens']):>6} tokens  {score:<8}  "),
            Text(visible(verdict), "dim"),
        ]
        line = Text.assemble(*parts)
        line.rstrip()
        say(console, line)
    if table.num_rows > len(rows):
        rest = table.num_rows - len(rows)
        say(console, Text(f"{rest:,} more; --limit 0 lists all", style="dim"))


def _summary(run: RunData, console: Console) -> None:
    listing = Table("kind", "rollouts", "correct", "kept", "the first", box=None, pad_edge=False)
    total, correct, kept = Counter[str](), Counter[str](), Counter[str]()
    for _, kind, grade, decision in run.outcomes():
        total[kind] += 1
        correct[kind] += grade == "correct"
        kept[kind] += bool(decision.get("kept"))
    for kind in KINDS:
        ids = run.rollouts.filter(pc.equal(run.rollouts["kind"], kind))["rollout_id"].slice(0, 3).to_pylist()
        counts = (str(counter[kind]) for counter in (total, correct, kept))
        listing.add_row(Text(kind), *counts, Text(_lines(ids), overflow="fold"))
    console.print(listing)
    repairs = [i for i, d in run.decisions.items() if d["kept"] and d["stage"] == 3][:5]
    if repairs:
        say(console, Text("\nkept repairs, the first:\n" + _lines(repairs)))
    say(
        console,
        Text(
            "\n`heal show DIR ROLLOUT_ID` prints one. --kind, --grade, --problem, --stratum, --kept, --dropped and "
            "--limit list others."
        ),
    )


def _lines(ids: Sequence[str]) -> str:
    return "\n".join(map(visible, ids))
