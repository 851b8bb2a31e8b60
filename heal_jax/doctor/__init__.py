"""`heal doctor`: what a run needs, looked at one by one, and what to do where something is missing."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax.config import Config
from heal_jax.doctor import asked, host, machine
from heal_jax.doctor.finding import OK, PROBLEM, WARNING, Finding
from heal_jax.errors import InputError, one_line

COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


def examine(config: Config | None, out: Path) -> Iterator[Finding]:
    """Look at everything; with a config, at what it asks for, too. A check that fails itself is a finding."""
    found: dict[str, Any] = {}

    def devices() -> Iterator[Finding]:
        found["devices"] = machine.devices()
        yield from host.of_devices(found["devices"], machine.accelerators(), os.environ.get("JAX_PLATFORMS", ""))

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", host.packages),
        ("extras", lambda: host.extras(config)),
        ("devices", devices),
        ("memory", host.memory),
        ("processes", lambda: host.of_processes(os.environ)),
        ("cache", host.compile_cache),
        ("disk", lambda: host.disk(out, config)),
    ]
    if config is not None:
        checks += [
            ("models", lambda: asked.models(config, found)),
            ("tokenizer", lambda: asked.tokenizers(config, found)),
            ("problems", lambda: asked.problems(config, found)),
            ("mesh", lambda: asked.mesh(config, found)),
        ]
    for topic, check in checks:
        try:
            yield from check()
        except InputError as error:
            yield Finding(topic, PROBLEM, one_line(error))
        except Exception as error:  # a doctor comes to the end of the list
            yield Finding(topic, WARNING, f"could not be looked at ({type(error).__name__}: {one_line(error)[:200]})")


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line a finding, its advice below."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for f in findings:
        advice = Text.assemble("\n", ("→ " if console.encoding.startswith("utf") else "-> ") + f.advice)
        text = Text.assemble(f.text, advice if f.advice else "")
        grid.add_row(Text(f.level, COLOURS[f.level]), Text(f.topic, "bold"), text)
    console.print(grid)
    counts = {level: sum(f.level == level for f in findings) for level in (PROBLEM, WARNING)}
    said = (f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts.items())
    console.print(f"\n{', '.join(said)}", markup=False)
