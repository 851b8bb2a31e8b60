"""How progress reads: the figures of a stage in words and bars, as a plain line or as lines of a terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "12345678"
GRADES = {"correct": "green", "wrong": "red", "truncated": "yellow", "unparsable": "magenta", "timeout": "yellow"}
NAME, BAR = 11, 24  # columns of a stage's name and of its bar


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far a stage is. tokens_per_s and eta_seconds are None while they are not known; counts: what was found so far
    (progress.py names them); losses: the last ones of a training; seconds: since the stage began."""

    stage: str
    done: int
    total: int
    unit: str
    tokens: int
    tokens_per_s: float | None
    eta_seconds: float | None
    counts: Mapping[str, Any]
    losses: Sequence[float] = ()
    seconds: float = 0.0


def bars(values: Sequence[float], plain: bool = False) -> str:
    """One character a value, as high as it is beside the largest; nothing is a blank. plain: ASCII digits."""
    marks, most = DIGITS if plain else BLOCKS, max(values, default=0)
    return "".join(" " if x <= 0 else marks[min(len(marks) - 1, int(x / most * len(marks)))] for x in values)


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def found(standing: Standing, plain: bool = False) -> list[Text]:
    """What a stage found so far, part by part. plain: in ASCII."""
    out = []
    for name, value in standing.counts.items():
        if name == "grades":
            total = max(1, sum(value.values()))
            shares = [(grade, value.get(grade, 0) / total) for grade in GRADES]
            out += [Text(f"{_share(share)} {g}", GRADES[g]) for g, share in shares if share or g == "correct"]
        elif name == "pass_rates":
            out.append(Text(f"pass rate 0|{bars(value, plain)}|1"))
        elif name == "strata":
            out.append(Text("{solved} solved, {hard} hard ({unsolved} unsolved)".format_map(value)))
        elif name == "pure":
            share = value["passed"] / value["scored"] if value["scored"] else 0.0
            out.append(Text(f"PURE passes {share:.0%} of {value['scored']:,}"))
        elif name == "examples":
            out += [Text(f"stage {stage}: {n:,}") for stage, n in value.items()]
        elif name in ("hindsight", "repair"):
            kept = "{kept:,} of {candidates:,} kept ({problems_kept:,} of {problems:,} problems)"
            out += [Text(f"{name} {kept.format_map(value)}")] if value["candidates"] else []
        elif name == "loss":
            loss = Text("loss not finite", "red") if value is None else Text(f"loss {value:.4f}")
            low = min(standing.losses, default=0.0)
            curve = bars([x - low + 1e-9 for x in standing.losses], plain) if len(standing.losses) > 1 else ""
            out.append(Text.assemble(loss, f" {curve}" if curve else ""))
        elif name in ("learning_rate", "grad_norm"):
            if value is not None:
                out.append(Text(f"{name.replace('_', ' ')} {value:.2g}"))
        elif name == "mfu":
            out += [Text(f"MFU {value:.0%}")] if value is not None else []
        elif name == "repaired":
            out.append(Text(f"{value:,} problems repaired"))
        elif isinstance(value, int):
            out.append(Text(f"{value:,} {name.replace('_', ' ')}"))
        else:
            out.append(Text(str(value)))
    return out


def _share(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def speed(standing: Standing, waited: float = 0.0) -> list[Text]:
    """Tokens a second, and the time left; `waited`: seconds since this was the standing."""
    out = []
    if standing.tokens_per_s:
        out.append(Text(f"{standing.tokens_per_s:,.0f} tokens/s", "cyan"))
    if standing.done < standing.total and standing.eta_seconds is not None:
        out.append(Text(f"{clock(max(0.0, standing.eta_seconds - waited))} left"))
    if standing.done >= standing.total and standing.unit:
        out.append(Text(f"in {clock(standing.seconds)}"))
    return out


def at(standing: Standing) -> str:
    """5/12 shards."""
    return f"{standing.done:,}/{standing.total:,} {standing.unit}".rstrip()


def line(standing: Standing, plain: bool = False) -> Text:
    """All of it in one line."""
    parts = [*([Text(at(standing))] if standing.unit else []), *found(standing, plain), *speed(standing)]
    return Text.assemble(f"{standing.stage:<{NAME - 1}} ", Text(", ").join(parts))


def lasting(standing: Standing, wide: int, plain: bool = False) -> Text:
    """The line of a finished stage on a terminal so wide; where it is broken, between parts, it is indented."""
    name = f"{standing.stage:<{NAME - 1}} "
    return Text.assemble((name, "bold"), broken([*found(standing, plain), *speed(standing)], wide, len(name), NAME))


def block(standing: Standing | None, name: str, doing: str, waited: float, wide: int, spinner: Spinner) -> Group:
    """The lines of a stage at work: bar, speed and time left; below them what it found."""
    if standing is None:
        return Group(_row(spinner, Text(name, "bold"), Text(doing, "dim")))
    bar = ProgressBar(max(1, standing.total), standing.done, width=max(8, min(BAR, wide - len(standing.stage) - 50)))
    first = _row(spinner, Text(standing.stage, "bold"), bar, Text(at(standing)), *speed(standing, waited))
    below = [*found(standing), *([Text(doing, "dim")] if doing else [])]
    return Group(first, *([Text("  ") + broken(below, wide, 2, 2)] if below else []))


def _row(*cells: RenderableType) -> Table:
    grid = Table.grid(padding=(0, 1))
    for _ in cells:
        grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(*cells)
    return grid


def broken(parts: Sequence[Text], wide: int, used: int, indent: int) -> Text:
    """Parts in a row, broken between them where the next does not fit; `used`: columns of the first line before it."""
    text, column = Text(), used
    for i, part in enumerate(parts):
        end = "," if i + 1 < len(parts) else ""
        need = part.cell_len + len(end)
        if column > indent and column + need > wide:
            text.append("\n" + " " * indent)
            column = indent
        text.append_text(part).append(end + (" " if end else ""))
        column += need + 1
    return text
