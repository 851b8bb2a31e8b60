"""`heal bench faults`: kill a run at random moments, go on with the same command, compare with an undisturbed one.

What is compared is what DESIGN section 2 calls the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from heal_jax.config import load
from heal_jax.errors import RunError
from heal_jax.progress import Progress
from heal_jax.store import file_sha256, write_json
from heal_jax.train.data import read_stage

STAGES = ("sample", "hindsight", "repair", "curate", "train", "evaluate", "export")
PLACES = ("start-up", *STAGES)
START_UP = 4.0  # seconds, at least: libraries are imported, models checked
POLL = 0.02  # seconds


def content(out: Path) -> dict[str, str]:
    """Digests, by file or folder, of what must be the same bytes: rows of every table, curriculum examples decoded in
    order, exported weights, the summary without times.
    """
    found: dict[str, Any] = {str(p.relative_to(out)): pq.read_table(p).to_pylist() for p in out.rglob("*.parquet")}
    for folder in out.glob("curriculum/stage?"):
        found[str(folder.relative_to(out))] = [vars(example) for example in read_stage(folder)]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found["summary.json"] = {k: v for k, v in summary.items() if k not in ("seconds", "throughput")}
    digests = {
        name: hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest() for name, data in found.items()
    }
    weights = {str(p.relative_to(out)): file_sha256(p) for p in out.rglob("export/**/*.safetensors")}
    return dict(sorted((digests | weights).items()))


def rollout_ids(out: Path) -> Counter[str]:
    tables = [pq.read_table(path, columns=["rollout_id"]) for path in out.glob("rollouts/*.parquet")]
    return Counter(name for table in tables for name in table["rollout_id"].to_pylist())


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended. place: where it was sent a signal, empty where it came to its end; said: its stderr."""

    place: str
    status: int
    said: str


class Disturbed:
    """A run in `out` that is killed again and again. seconds: how long each place of PLACES takes, about."""

    def __init__(self, config: Path, out: Path, seconds: dict[str, float], environment: Mapping[str, str]):
        self.out, self.seconds, self.environment = out, seconds, environment
        command = "from heal_jax.cli import main; main()"
        self.command = [sys.executable, "-c", command, "run", str(config), "--out", str(out)]
        self.written: dict[Path, tuple[int, int]] = {}  # finished shards as they lay there after a kill

    def place(self, pid: int) -> str:
        """Where the process is: start-up until it holds the lock, then the first stage that is not done."""
        try:
            if json.loads((self.out / ".lock").read_text(encoding="utf-8"))["pid"] != pid:
                return "start-up"
            done = json.loads((self.out / "manifest.json").read_text(encoding="utf-8"))["stages"]
        except (OSError, ValueError):
            return "start-up"
        return next((stage for stage in STAGES if stage not in done), STAGES[-1])

    def attempt(self, target: str = "", share: float = 0.0, number: int = signal.SIGKILL) -> Ended:
        """Run; with a target, send it a signal when it is there, or already past it, and this share of the place's time
        has passed. Raises RunError where it ends badly by itself.
        """
        with tempfile.TemporaryFile() as file:
            place, sent = "start-up", False
            process = subprocess.Popen(self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=file)
            try:
                while process.poll() is None and (not target or PLACES.index(place) < PLACES.index(target)):
                    time.sleep(POLL)
                    place = self.place(process.pid)
                if target:
                    process.wait(share * self.seconds[place])
            except subprocess.TimeoutExpired:
                place, sent = self.place(process.pid), True
                process.send_signal(number)
                process.wait()
                self._note_shards()
            finally:
                process.kill()
                process.wait()
            file.seek(0)
            said = file.read().decode(errors="replace").strip()
        if process.returncode and not sent:
            raise RunError(f"{self.out}: the run ended with status {process.returncode}: {said[-500:]}")
        return Ended(place if sent else "", process.returncode, said)

    def _note_shards(self) -> None:
        path = self.out / "manifest.json"
        for name in json.loads(path.read_text(encoding="utf-8"))["shards"] if path.is_file() else ():
            shard = self.out / f"{name}.parquet"
            self.written.setdefault(shard, _identity(shard))

    def made_again(self) -> int:
        """Finished shards that were written a second time."""
        return sum(_identity(path) != before for path, before in self.written.items())


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def measure(
    config: Path,
    kills: int,
    progress: Progress,
    whole: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    seed: int = 0,
) -> dict[str, Any]:
    """Kill runs of `config` so often, each at most once a place, and compare them with `whole`, by default a run of its
    own. Raises RunError where a run ends badly by itself.
    """
    load(config)  # raises InputError
    draw, start = random.Random(seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="heal-faults-"))
    seconds = {"start-up": START_UP}
    if whole is None:
        whole = folder / "whole"
        progress.say("an undisturbed run")
        Disturbed(config, whole, seconds, environment).attempt()
    wanted, ids = content(whole), rollout_ids(whole)
    seconds |= json.loads((whole / "summary.json").read_text(encoding="utf-8"))["seconds"]
    killed: Counter[str] = Counter()
    lost = duplicated = again = runs = attempts = 0
    differing: list[str] = []
    while killed.total() < kills:
        targets = sorted(draw.sample(PLACES, min(len(PLACES), kills - killed.total())), key=PLACES.index)
        runs += 1
        run = Disturbed(config, folder / f"killed-{runs}", seconds, environment)
        for target in targets:
            attempts += 1
            if attempts > 4 * kills + 10:
                raise RunError(f"{config}: its runs end before they can be killed; try a longer one")
            if place := run.attempt(target, draw.random()).place:
                killed[place] += 1
                progress.say(f"kill {killed.total()} of {kills}: in {place}")
                progress.update("faults", killed.total(), kills, "kills")
        run.attempt()
        found, have = content(run.out), rollout_ids(run.out)
        lost += (ids - have).total()
        duplicated += sum(count - 1 for count in have.values())
        again += run.made_again()
        differing += [f"{run.out.name}/{k}" for k in sorted(wanted | found) if wanted.get(k) != found.get(k)]
    if not differing:
        shutil.rmtree(folder)
    return {
        "config": str(config),
        "kills": {place: killed[place] for place in PLACES},
        "runs": runs,
        "rollouts": ids.total(),
        "lost": lost,
        "duplicated": duplicated,
        "shards_made_again": again,
        "identical": not differing,
        "differing": differing,
        "folder": str(folder) if differing else None,
        "seconds": round(time.monotonic() - start, 1),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    table = Table("killed in", "times")
    for place, count in result["kills"].items():
        table.add_row(place, str(count))
    table.add_row("all", str(sum(result["kills"].values())), style="bold")
    console.print(table)
    console.print(
        f"{result['runs']} runs of {result['config']}, {result['rollouts']} rollouts each: "
        f"lost {result['lost']}, duplicated {result['duplicated']}, finished shards made again "
        f"{result['shards_made_again']}, identical {'yes' if result['identical'] else 'no'}; {result['seconds']:.0f} s",
        soft_wrap=True,
    )


def run(config: Path, kills: int, progress: Progress, file: Path | None) -> None:
    """Raises RunError where anything was lost, made twice, or differs."""
    result = measure(config, kills, progress)
    progress.close()
    if file is not None:
        write_json(file, result)
    show(result, progress.printer)
    progress.log("result", **result)
    if any((result["lost"], result["duplicated"], result["shards_made_again"], result["differing"])):
        what: Sequence[str] = result["differing"][:5]
        raise RunError(f"the killed runs are not as the undisturbed one ({', '.join(what)}); see {result['folder']}")
