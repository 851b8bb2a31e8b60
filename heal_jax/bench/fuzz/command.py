"""`heal bench fuzz`: each kind of case in a process of its own, so that a crash or a hang there is a finding here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heal_jax.errors import InputError, RunError
from heal_jax.progress import Progress
from heal_jax.store import write_json

SHARES = {"config": 0.4, "problems": 0.3, "model": 0.24, "run": 0.06}  # of the cases: by what one of them costs
STUCK = 90.0  # seconds without another case after which a process is ended
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def measure(cases: int, seed: int, config: Path, progress: Progress, folder: Path) -> dict[str, Any]:
    """Run `config` once, then do so many cases over all kinds, the same for the same seed. Results by kind. Raises
    RunError where the run does not come to its end.
    """
    start, environment = time.monotonic(), os.environ | ENVIRONMENT
    progress.say("a run to damage")
    command = [sys.executable, "-c", "from heal_jax.cli import main; main()", "run", str(config), "--out"]
    done = subprocess.run([*command, str(folder / "whole"), "--quiet"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{config}: its run ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    kinds = {}
    for name, share in SHARES.items():
        (folder / name).mkdir()
        kinds[name] = _kind(name, max(1, round(cases * share)), seed, folder, environment, progress)
    total = {key: sum(kind[key] for kind in kinds.values()) for key in ("cases", "accepted", "refused")}
    failures = sum(len(kind["failures"]) for kind in kinds.values())
    return {"seed": seed, **total, "failures": failures, "kinds": kinds, "seconds": round(time.monotonic() - start, 1)}


def _kind(
    name: str, cases: int, seed: int, folder: Path, environment: dict[str, str], progress: Progress
) -> dict[str, Any]:
    base = folder / name
    current, result = base / "current.txt", base / "result.json"
    module = "heal_jax.bench.fuzz.worker"
    command = [sys.executable, "-m", module, name, str(cases), str(seed), str(base), str(folder / "whole"), str(result)]
    reached = 0
    with open(base / "said.txt", "w+b") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if current.is_file():
                    number = current.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
                    reached = max(reached, int(number or 0))  # it may be half written
                    progress.update(f"fuzz {name}", min(cases, reached), cases, "cases")
                    if time.time() - current.stat().st_mtime > STUCK:
                        break
        finally:
            process.kill()
            status = process.wait()
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        said.seek(0)
        text = said.read().decode(errors="replace").strip()[-1000:]
    number, _, case = current.read_text(encoding="utf-8").partition("\n") if current.is_file() else ("0", "", "")
    failure = {"what": f"the process hung or ended (status {status}): {text}", "case": case, "where": ""}
    return {"cases": int(number), "accepted": 0, "refused": 0, "slowest": 0.0, "failures": [failure]}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("kind", "cases", "accepted", "refused", "slowest, s", "failures")
    for name, kind in result["kinds"].items():
        figures = kind["cases"], kind["accepted"], kind["refused"], kind["slowest"], len(kind["failures"])
        table.add_row(name, *map(str, figures))
    table.add_row("all", *(str(result[key]) for key in ("cases", "accepted", "refused")), "", str(result["failures"]))
    console.print(table)
    console.print(f"seed {result['seed']}, {result['seconds']} s")


def run(cases: int, seed: int, config: Path, progress: Progress, file: Path | None) -> None:
    """Raises RunError where a case failed; the failing cases, shrunk, are printed and kept."""
    if importlib.util.find_spec("hypothesis") is None:
        raise InputError("bench fuzz: needs hypothesis: pip install 'heal-jax[fuzz]'")
    folder = Path(tempfile.mkdtemp(prefix="heal-fuzz-"))
    result = measure(cases, seed, config, progress, folder)
    progress.close()
    if file is not None:
        write_json(file, result)
    show(result, progress.printer)
    progress.log("result", **result)
    if not result["failures"]:
        shutil.rmtree(folder)
        return
    for name, kind in result["kinds"].items():
        for i, failure in enumerate(kind["failures"], 1):
            path = folder / f"{name}-{i}.txt"
            again = f"heal bench fuzz --cases {cases} --seed {seed}"
            path.write_text(
                f"{failure['what']}\n\n{failure['where']}\n{failure['case']}\n\nagain: {again}\n", errors="replace"
            )
            said = f"{path}: {failure['what'][:300]}\n  {failure['case'][:500]}"
            progress.printer.print(said, markup=False, soft_wrap=True)
    raise RunError(f"{result['failures']} cases fail (each stands for all of its sort); see {folder}")
