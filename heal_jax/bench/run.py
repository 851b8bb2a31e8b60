"""`heal bench`."""

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from heal_jax import cache
from heal_jax.bench import decode, machine, round, shared, train
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure, markdown, show
from heal_jax.config import ModelSpec
from heal_jax.model.lm import open_model
from heal_jax.progress import Progress
from heal_jax.store import write_json

PARTS = {
    "decode": lambda bench: [*decode.figures(bench), *shared.decoding(bench)],
    "round": round.figures,
    "pure": shared.scoring,
    "train": train.figures,
}
REPEATS = 5


def run(
    part: str,
    model: str,
    progress: Progress,
    *,
    file: Path | None,
    quick: bool,
    tunix_python: str | None,
    table: bool = False,
) -> list[Figure]:
    """Measure one part, or all; the table (as Markdown, if `table`), and JSON in `file`."""
    start = time.monotonic()
    cache.enable(progress.say)  # compiling is no part of any figure, and is most of a first run
    lm = open_model(ModelSpec(model))
    bench = Bench(lm, quick, 2 if quick else REPEATS, tunix_python, progress.say)
    found = machine.describe()
    found["bytes_per_second"] = machine.bandwidth(1 << 24 if quick else machine.READ_BYTES)
    figures: list[Figure] = []
    names = list(PARTS) if part == "all" else [part]
    try:
        for number, name in enumerate(names):
            progress.update("bench", number, len(names), "parts", counts={"part": name})
            figures += PARTS[name](bench)
        progress.update("bench", len(names), len(names), "parts")
    finally:
        bench.close()
    progress.close()
    found["load_after"] = os.getloadavg()[0]
    found["versions"] |= bench.versions
    result = {
        "machine": found,
        "model": model,
        "quick": quick,
        "repeats": bench.repeats,
        "seconds": time.monotonic() - start,
        "figures": [figure.to_json() for figure in figures],
        "notes": bench.notes,
    }
    if file is not None:
        write_json(file, result)
    progress.log("result", **result)
    _print(result, figures, progress.printer, table)
    return figures


def _print(result: dict[str, Any], figures: list[Figure], console: Console, table: bool) -> None:
    found, moved = result["machine"], result["machine"]["bytes_per_second"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    for line in (
        f"{result['model']}, float32, {result['repeats']} repeats in turns, {result['seconds']:.0f} s",
        f"{found['processor']}, {found['threads']} threads, {found['memory_gb']} GB, device {found['device']}, "
        f"load {found['load_before']:.1f} to {found['load_after']:.1f}",
        versions,
        f"memory: reads {moved['read'] / 1e9:.0f} GB/s, copies {moved['copy'] / 1e9:.0f} GB/s",
    ):
        console.print(line, markup=False)
    console.print()
    if table:
        console.print(markdown(figures), markup=False, soft_wrap=True)
    else:
        show(figures, console)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False)
