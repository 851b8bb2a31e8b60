"""The run directory on disk: atomic files, the manifest, rollout shards (DESIGN sections 5 and 6).

A shard counts once it lies under its final name and the manifest holds its checksum; what an interruption leaves
behind is a temporary file that the next run overwrites.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heal_jax.errors import InputError
from heal_jax.processes import once, primary

INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())

ROLLOUTS = pa.schema(
    [
        ("problem_id", pa.string()),
        ("rollout_id", pa.string()),
        ("kind", pa.string()),
        ("parent_id", pa.string()),
        ("breakpoint_step", pa.int32()),
        ("kept_tokens", pa.int32()),
        ("prompt_tokens", INTS),
        ("tokens", INTS),
        ("context_tokens", INTS),
        ("entropy", FLOATS),
        ("logprob", FLOATS),
        ("sampling_logprob", FLOATS),
        ("step_starts", INTS),
        ("finish", pa.string()),
        ("grade", pa.string()),
        ("pure_score", pa.float32()),
        ("step_ppl", FLOATS),
        ("step_expected_ppl", FLOATS),
        ("text", pa.string()),
        ("answer", pa.string()),
    ]
)
PROBLEMS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "split", "level", "question", "answer")),
        ("pass_rate", pa.float32()),
        ("stratum", pa.string()),
    ]
)
DECISIONS = pa.schema(
    [("rollout_id", pa.string()), ("stage", pa.int32()), ("kept", pa.bool_()), ("reason", pa.string())]
)
EVALUATION = pa.schema(
    [
        ("model", pa.string()),
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("tokens", INTS),
        ("grade", pa.string()),
    ]
)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary sibling, flush it to disk, rename it: the path holds all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or unreadable ({error}); use another --out or restore the file") from None


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Rows as one Parquet file; columns that a row lacks are null."""
    table = pa.Table.from_pylist(rows, schema=schema)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: Path) -> pa.Table:
    """Raises InputError where the file is missing or damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged or missing ({reason}); delete it and run again to make it anew") from None


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """One hash of the names and contents of a folder's files (not of its subfolders)."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


class RunDirectory:
    """A run directory and its manifest.

    Stages are marked done with what they found; shards are listed with their checksums. Every change is on disk
    before the call returns. Of several processes each keeps the manifest in mind and the first one writes it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.manifest: dict[str, Any] = {"stages": {}, "shards": {}}
        if self._path.is_file():
            self.manifest = read_json(self._path)
            if not isinstance(self.manifest, dict) or not {"stages", "shards"} <= set(self.manifest):
                raise InputError(f"{self._path}: not a manifest of heal_jax; use another --out")

    @property
    def _path(self) -> Path:
        return self.root / "manifest.json"

    def update(self, **entries: Any) -> None:
        self.manifest |= entries
        if primary():
            write_json(self._path, self.manifest)

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, or None."""
        return self.manifest["stages"].get(stage)

    def finish(self, stage: str, **record: Any) -> None:
        self.manifest["stages"][stage] = record
        self.update()

    def shard(
        self, name: str, make: Callable[[], list[dict[str, Any]]], schema: pa.Schema = ROLLOUTS, owner: int = 0
    ) -> tuple[pa.Table, bool]:
        """The table of a shard, made only where it is not there yet; and whether it was made now.

        All processes make it, process `owner` writes it. Raises InputError where the file is there but is not what was
        written.
        """
        path = self.root / f"{name}.parquet"
        recorded = self.manifest["shards"].get(name)
        if once(lambda: recorded is not None and path.is_file()):
            if file_sha256(path) != recorded:
                raise InputError(f"{path}: changed or damaged since it was written; delete it and run again")
            return read_table(path), False
        rows = make()

        def write() -> str:
            write_table(path, rows, schema)
            return file_sha256(path)

        self.manifest["shards"][name] = once(write, by=owner)
        self.update()
        return read_table(path), True

    def rollouts(self, kind: str | None = None) -> pa.Table:
        """All finished rollout shards, of one kind or of all, in order."""
        prefixes = [kind] if kind else ["base", "hindsight", "repair"]
        names = [n for p in prefixes for n in sorted(self.manifest["shards"]) if n.startswith(f"rollouts/{p}-")]
        tables = [read_table(self.root / f"{name}.parquet") for name in names]
        return pa.concat_tables(tables) if tables else ROLLOUTS.empty_table()
