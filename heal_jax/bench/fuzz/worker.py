"""The cases of one kind, drawn, done, counted, and shrunk where they fail."""

import importlib
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from heal_jax.bench.fuzz.watch import Kind, refusal


def kind(name: str, base: Path, run: Path) -> Kind:
    """A kind by name. base: a folder for what its cases share; run: a finished run directory."""
    module = importlib.import_module(f"heal_jax.bench.fuzz.{name}")
    return module.make(base, run)


def work(kind: Kind, cases: int, number: int, base: Path) -> dict[str, Any]:
    """Do so many cases drawn with a seed. The counts, the slowest case in seconds, and the failures, shrunk."""
    done: dict[str, Any] = {"cases": 0, "accepted": 0, "refused": 0, "slowest": 0.0, "failures": []}
    folder = base / "case"
    _empty(folder)
    kind.attempt(kind.valid, folder)  # what is imported or compiled once is no part of a case

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(kind.cases)
    def one(case: Any) -> None:
        current = f"{done['cases']}\n{case!r}"  # what is known of a case that ends the process
        (base / "current.txt").write_text(current, encoding="utf-8", errors="backslashreplace")
        _empty(folder)
        start = time.perf_counter()
        try:
            said = refusal(kind, case, folder)
        except Exception as error:
            error.add_note(f"case: {case!r}")
            raise
        done["slowest"] = max(done["slowest"], round(time.perf_counter() - start, 2))
        done["refused" if said else "accepted"] += 1
        done["cases"] += 1

    try:
        one()
    except ExceptionGroup as group:
        found = list(group.exceptions)
    except Exception as error:
        found = [error]
    else:
        found = []
    done["failures"] = [described(error) for error in found]
    shutil.rmtree(folder, ignore_errors=True)
    return done


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def described(error: Exception) -> dict[str, str]:
    """A failure: what happened, where, and the case."""
    notes = getattr(error, "__notes__", [])
    case = next((note.removeprefix("case: ") for note in notes if note.startswith("case: ")), "")
    where = traceback.format_list(traceback.extract_tb(error.__traceback__)[-3:])
    return {"what": f"{type(error).__name__}: {error}"[:2000], "case": case, "where": "".join(where)}


if __name__ == "__main__":
    name, cases, number, base, run, result = sys.argv[1:]
    done = work(kind(name, Path(base), Path(run)), int(cases), int(number), Path(base))
    Path(result).write_text(json.dumps(done), encoding="utf-8")
