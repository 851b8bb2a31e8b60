"""Run directories: a damaged one is opened, reported and shown, or what is damaged is named; what was not damaged stays
as it was, and nothing beside the directory is touched."""

import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st
from rich.console import Console

from heal_jax.bench.fuzz.mutate import VALUES, as_json, broken, edited
from heal_jax.bench.fuzz.watch import Failure, Kind
from heal_jax.config import load
from heal_jax.pipeline import NEEDS
from heal_jax.progress import Progress
from heal_jax.report.page import write_report
from heal_jax.report.show import show
from heal_jax.run import open_run
from heal_jax.store import file_sha256

MANIFESTS = ("manifest.json", "manifest.json.backup")
OWN = {*MANIFESTS, ".lock", "report.html"}  # files that opening and reporting write anew
ASIDE = ("", ".damaged", ".outdated")  # what a file may be renamed to
NAMES = st.sampled_from(
    ("../beside", "rollouts/../../beside", "/etc/hostname", "rollouts/base-9", "", ".", "x" * 300, "\x00", "\ud800")
)


@dataclass(frozen=True)
class Damage:
    """edits: file, what is done to it, and with what; does: open, report or show; asks: the stages that `open` needs to
    be done, or the rollout to show."""

    edits: tuple[tuple[str, str, Any], ...]
    does: str = "open"
    asks: Any = ()


class Reader:
    """Reads a case. run: the whole run directory."""

    def __init__(self, run: Path):
        self.run = run
        self.config = load(run / "config.yaml")
        self.files = {str(p.relative_to(run)): file_sha256(p) for p in sorted(run.rglob("*")) if p.is_file()}
        self.shard = next(run.glob("rollouts/base-*.parquet"))

    def __call__(self, case: Damage, folder: Path) -> None:
        out = folder / "run"
        shutil.copytree(self.run, out)
        shutil.copy(self.shard, folder / "beside.parquet")
        for name, what, value in case.edits:
            damage(out, name, what, value)
        there = {name for name in self.files if (out / name).is_file() and file_sha256(out / name) == self.files[name]}
        console = Console(file=io.StringIO(), highlight=False)
        try:
            if case.does == "open":
                with open_run(self.config, out, Progress(console), case.asks):
                    pass
            elif case.does == "report":
                write_report(out)
            else:
                show(out, case.asks, console)
        finally:
            self._look(folder, there)

    def _look(self, folder: Path, there: set[str]) -> None:
        """Raise Failure where anything but what was damaged has changed."""
        if {path.name for path in folder.iterdir()} != {"run", "beside.parquet"}:
            raise Failure("files beside the run directory came or went")
        if file_sha256(folder / "beside.parquet") != self.files[str(self.shard.relative_to(self.run))]:
            raise Failure("a file beside the run directory has changed")
        for name in there - OWN:
            path = folder / "run" / name
            kept = [path.with_name(path.name + suffix) for suffix in ASIDE]
            if not any(p.is_file() and file_sha256(p) == self.files[name] for p in kept):
                raise Failure(f"{name} is lost")

    def culprits(self, case: Damage, folder: Path) -> tuple[str, ...]:
        return (str(folder / "run"),)


def damage(out: Path, name: str, what: str, value: Any) -> None:
    path = out / name
    if not path.is_file():  # an edit before this one took it
        return
    data = path.read_bytes()
    if what == "swap":
        other = out / value
        if other.is_file():
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        return
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(value)
    elif what == "cut":
        path.write_bytes(data[: value % (len(data) + 1)])
    elif what == "flip":
        flipped = bytearray(data)
        for bit in value if data else ():
            flipped[bit // 8 % len(data)] ^= 1 << bit % 8
        path.write_bytes(flipped)
    elif what == "bytes":
        path.write_bytes(value)


def signed(manifest: Any) -> bytes:
    """A manifest with the checksum that it should have."""
    if isinstance(manifest, dict) and "sha256" in manifest:
        rest = {name: value for name, value in manifest.items() if name != "sha256"}
        text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True)
        manifest = {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return as_json(manifest)


def _manifests(manifest: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A manifest with fields changed, or names of files outside; mostly with a checksum that fits."""
    files = {**manifest.get("files", {}), "train": {}}
    sums = st.sampled_from((next(iter(manifest["shards"].values())), "0" * 64)) | VALUES
    named = st.dictionaries(NAMES, sums, min_size=1, max_size=2)
    shards = named.map(lambda new: {**manifest, "shards": {**manifest["shards"], **new}})
    others = named.map(lambda new: {**manifest, "files": {**files, "train": new}})
    parts = [
        st.just(name).flatmap(lambda name: edited(manifest[name]).map(lambda part: {**manifest, name: part}))
        for name in manifest
    ]
    one_field = st.one_of(parts)
    changed = edited(manifest) | one_field | one_field | shards | others
    return changed.map(signed) | changed.map(signed) | changed.map(as_json) | VALUES.map(as_json)


def make(base: Path, run: Path) -> Kind:
    reader = Reader(run)
    names = sorted(reader.files)
    near = [name for name in names if "/" not in name or name.endswith(".parquet")]
    files = st.sampled_from(near) | st.sampled_from(names)
    bits = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=3)
    edits = [
        st.tuples(files, st.sampled_from(("empty", "gone", "folder")), st.none()).map(
            lambda edit: (edit[0], "cut", 0) if edit[1] == "empty" else edit
        ),
        st.tuples(files, st.just("cut"), st.integers(0, 1 << 20)),
        st.tuples(files, st.just("flip"), bits),
        st.tuples(files, st.just("swap"), files),
        st.tuples(files, st.just("link"), st.sampled_from(("../beside.parquet", "gone", ".", "/dev/null"))),
        st.tuples(st.just("config.yaml"), st.just("bytes"), _configs((run / "config.yaml").read_bytes())),
        st.tuples(
            st.just("summary.json"),
            st.just("bytes"),
            edited(json.loads((run / "summary.json").read_bytes())).map(as_json),
        ),
        st.tuples(st.just("metrics.jsonl"), st.just("bytes"), _metrics((run / "metrics.jsonl").read_bytes())),
    ]
    manifests = _manifests(json.loads((run / "manifest.json").read_bytes()))
    edits += [st.tuples(st.just(name), st.just("bytes"), manifests) for name in MANIFESTS if name in reader.files]
    both = manifests.map(lambda data: tuple((name, "bytes", data) for name in MANIFESTS if name in reader.files))
    damaged = st.lists(st.one_of(edits), min_size=1, max_size=3).map(tuple) | both
    ids = [i for path in sorted(run.glob("rollouts/*.parquet")) for i in pq.read_table(path)["rollout_id"].to_pylist()]
    cases = (
        st.builds(Damage, damaged, st.just("open"), st.sampled_from(((), *NEEDS.values()))),
        st.builds(Damage, damaged, st.just("report")),
        st.builds(Damage, damaged, st.just("show"), st.sampled_from((None, *ids))),
    )
    return Kind("run", Damage(()), st.one_of(cases), reader, reader.culprits)


def _configs(valid: bytes) -> st.SearchStrategy[bytes]:
    changed = edited(yaml.safe_load(valid)).map(lambda data: yaml.safe_dump(data).encode())
    return changed | broken(valid)


def _metrics(valid: bytes) -> st.SearchStrategy[bytes]:
    lines = [json.loads(line) for line in valid.splitlines()]
    changed = edited(lines).map(
        lambda events: b"\n".join(map(as_json, events if isinstance(events, list) else [events]))
    )
    return changed | broken(valid)
