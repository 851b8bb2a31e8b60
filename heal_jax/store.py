"""The run directory on disk: atomic files, the manifest, rollout shards (DESIGN sections 5 and 6).

A shard counts once it lies under its final name and the manifest holds its checksum; what an interruption leaves
behind is a temporary file that the next run overwrites. What is damaged later is found by its checksum, set aside and
made again.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heal_jax import storage
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


def write_atomically(path: Path, write: Callable[[Path], object], owner: str = "") -> None:
    """`write` a temporary sibling, flush it to disk, rename it: the path holds all of it or what it held before.

    owner: names the temporary file where several processes may write the same path at a time.
    """
    if not isinstance(path, Path):  # an object, of storage.place: it is whole, or what it was
        with tempfile.TemporaryDirectory() as folder:
            write(file := Path(folder) / path.name)
            path.write_bytes(file.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{owner}.partial")
    temporary.unlink(missing_ok=True)  # it may be a link
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if path.is_dir() and not path.is_symlink():
        set_aside(path, ".damaged")
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, where the file system can: a rename then outlasts a loss of power."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_text(path: Path, text: str, owner: str = "") -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"), owner)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged or unreadable ({error}); use another --out or restore the file") from None


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Rows as one Parquet file; columns that a row lacks are null."""
    table = pa.Table.from_pylist(rows, schema=schema)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: Path) -> pa.Table:
    """Raises InputError where the file is missing or damaged, or holds text that is not UTF-8."""
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        return table
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged or missing ({reason}); delete it and run again to make it anew") from None


def digest(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its mappings."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path, sync: bool = False) -> str:
    """sync: also flush the file to disk, where whoever wrote it did not."""
    read = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            read.update(block)
    return read.hexdigest()


def folder_sha256(folder: Path) -> tuple[str, dict[str, str]]:
    """One hash of the names and contents of a folder's files (not of its subfolders), and the hash of each file."""
    files = {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}
    lines = "".join(f"{name}\0{recorded}\n" for name, recorded in files.items())
    return hashlib.sha256(lines.encode()).hexdigest(), files


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            folder.rmtree()


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a file or folder, so that a new one can take its place; an older one of that name goes."""
    aside = path.with_name(path.name + suffix)
    if aside.is_dir():
        shutil.rmtree(aside)
    os.replace(path, aside)
    return aside


def _made_by(stage: str, shard: str) -> bool:
    return _maker(shard) == stage


def _maker(shard: str) -> str:
    """The stage that makes the shards of this name."""
    kind = shard.partition("/")[2].partition("-")[0]
    return {"base": "sample"}.get(kind, kind) if shard.startswith("rollouts/") else "evaluate"


class RunDirectory:
    """A run directory and its manifest.

    Stages are marked done with what they found; shards and other files are listed with their checksums. Every change is
    on disk before the call returns, in manifest.json and then in its copy, manifest.json.backup, which is read where
    the first is damaged. Of several processes each keeps the manifest in mind and the first one writes it.

    Raises InputError where neither file holds a whole manifest. `say` gets a line where only one does.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda line: None):
        self.root = root
        self.manifest: dict[str, Any] = {"stages": {}, "shards": {}}
        if self._path.exists() or self._backup.exists():
            try:
                self.manifest = _read_manifest(self._path)
            except InputError as error:
                with contextlib.suppress(InputError):
                    self.manifest = _read_manifest(self._backup)
                    say(f"note: {error}; going on from {self._backup.name}")
                    return
                raise InputError(
                    f"{error}, and so is {self._backup.name}; use another --out, or remove both to make all of it anew"
                ) from None

    @property
    def _path(self) -> Path:
        return self.root / "manifest.json"

    @property
    def _backup(self) -> Path:
        return self.root / "manifest.json.backup"

    def update(self, **entries: Any) -> None:
        self.manifest |= entries
        if primary():
            text = json.dumps(self.manifest, ensure_ascii=False).encode(errors="replace")
            for path in (self._path, self._backup):
                write_json(path, {**self.manifest, "sha256": digest(json.loads(text))})
            storage.push(self.root)

    def inputs(self, stage: str) -> dict[str, str]:
        """Digests of what a stage is made from: rollouts by their shards, training by the curriculum's examples, the
        student's card by the evaluation too."""

        def rollouts(*kinds: str) -> dict[str, str]:
            shards = sorted(self.manifest["shards"].items())
            return {kind: digest([s for s in shards if s[0].startswith(f"rollouts/{kind}-")]) for kind in kinds}

        if stage in ("hindsight", "repair"):
            return rollouts("base")
        if stage == "curate":
            return rollouts("base", "hindsight", "repair")
        if stage in ("train", "evaluate", "export"):
            found = {"curriculum": self.manifest["stages"].get("curate", {}).get("curriculum", "")}
            if stage == "export":  # its card has the results
                shards = sorted(s for s in self.manifest["shards"].items() if s[0].startswith("evaluation/"))
                found["evaluation"] = digest(shards if "evaluate" in self.manifest["stages"] else [])
            return found
        return {}

    def outdated(self, stage: str) -> bool:
        """Whether the stage was begun with other inputs than those that are there now."""
        return self.manifest.get("inputs", {}).get(stage, self.inputs(stage)) != self.inputs(stage)

    def begin(self, stage: str) -> None:
        """Record what the stage is made from, before it makes anything."""
        self.manifest.setdefault("inputs", {})[stage] = self.inputs(stage)
        self.update()

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded; None where it has not finished, or its inputs have changed since."""
        return None if self.outdated(stage) else self.manifest["stages"].get(stage)

    def finish(self, stage: str, files: Sequence[Path] = (), **record: Any) -> None:
        """Mark a stage done. files: what it wrote besides shards, files or folders, whose checksums are kept."""

        def sums() -> dict[str, str]:
            storage.push(self.root)
            found = [p for path in files for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if p.is_file()]
            return {str(path.relative_to(self.root)): file_sha256(path) for path in found}

        self.manifest.setdefault("files", {})[stage] = once(sums) if files else {}
        self.manifest["stages"][stage] = record
        self.update()

    def forget(self, *stages: str, shards: Callable[[str], bool] = lambda name: False) -> None:
        """Count stages as not done and these shards as not there; their files are renamed NAME.outdated."""
        for name in filter(shards, list(self.manifest["shards"])):
            del self.manifest["shards"][name]
            path = self.root / f"{name}.parquet"
            if primary() and path.is_file():
                set_aside(path, ".outdated")
        for stage in stages:
            self.manifest["stages"].pop(stage, None)
            self.manifest.get("files", {}).pop(stage, None)
        self.update()

    def adopt(self, other: "RunDirectory", stages: Sequence[str]) -> None:
        """Take finished stages of another directory as they are, shards and files: links where the file system has
        them, copies elsewhere. What is there already stays, unless it was made anew there."""

        def take(name: str) -> None:
            source, target = other.root / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)

        for stage in stages:
            if (record := other.done(stage)) is None:
                raise InputError(f"{other.root}: stage {stage} has not finished")
            theirs = {s: recorded for s, recorded in other.manifest["shards"].items() if _maker(s) == stage}
            if any(self.manifest["shards"].get(s, recorded) != recorded for s, recorded in theirs.items()):
                self.forget(stage, shards=functools.partial(_made_by, stage))  # made again since, and not the same
            for name in [s for s in theirs if s not in self.manifest["shards"]]:
                take(f"{name}.parquet")
                self.manifest["shards"][name] = theirs[name]
            if stage not in self.manifest["stages"]:
                files = other.manifest.get("files", {}).get(stage, {})
                for name in files:
                    take(name)
                self.begin(stage)
                self.manifest.setdefault("files", {})[stage] = dict(files)
                self.manifest["stages"][stage] = record
        self.update()

    def damaged(self, path: Path) -> bool:
        """Whether a file is not what was written, as far as its checksum is known."""
        name = str(path.relative_to(self.root))
        sums = {f"{shard}.parquet": recorded for shard, recorded in self.manifest["shards"].items()}
        sums |= {
            file: recorded for files in self.manifest.get("files", {}).values() for file, recorded in files.items()
        }
        return name in sums and (not path.is_file() or file_sha256(path) != sums[name])

    def verify(self, say: Callable[[str], None]) -> list[str]:
        """Compare every file with its checksum; a damaged shard is renamed NAME.damaged, and the stage that made a
        damaged or missing file is no longer done. These stages; `say` gets a line for each file.
        """
        again: list[str] = []

        def wrong(path: Path, recorded: str) -> str:
            if not path.is_file() and not (storage.pull(path) and path.is_file()):
                return "missing"
            return "" if file_sha256(path) == recorded else "damaged"

        for name, recorded in list(self.manifest["shards"].items()):
            path = self.root / f"{name}.parquet"
            if found := wrong(path, recorded):
                aside = f"; set aside as {set_aside(path, '.damaged').name}" if found == "damaged" else ""
                say(f"note: {path}: {found}{aside}; it is made again")
                del self.manifest["shards"][name]
                again.append(_maker(name))
        for stage, files in self.manifest.get("files", {}).items():
            for file, recorded in files.items():
                if found := wrong(self.root / file, recorded):
                    say(f"note: {self.root / file}: {found}; stage {stage} is done again")
                    again.append(stage)
        again = [stage for stage in dict.fromkeys(again) if stage in self.manifest["stages"]]
        self.forget(*again)
        return again

    def shard(
        self, name: str, make: Callable[[], list[dict[str, Any]]], schema: pa.Schema = ROLLOUTS, owner: int = 0
    ) -> tuple[pa.Table, bool]:
        """The table of a shard, made only where it is not there yet; and whether it was made now.

        All processes make it, process `owner` writes it. Raises InputError as `read` does.
        """
        if name in self.manifest["shards"]:
            return self.read(name), False
        path, rows = self.root / f"{name}.parquet", make()

        def write() -> str:
            write_table(path, rows, schema)
            storage.push(path)
            return file_sha256(path)

        self.manifest["shards"][name] = once(write, by=owner)
        self.update()
        return self.read(name), True

    def read(self, name: str) -> pa.Table:
        """A shard that is there. Raises InputError where its file is not what was written."""
        path = self.root / f"{name}.parquet"

        def whole() -> bool:
            return path.is_file() and file_sha256(path) == self.manifest["shards"][name]

        if not whole() and not (storage.pull(path) and whole()):
            raise InputError(f"{path}: changed, damaged or gone since it was written; run again to make it anew")
        return read_table(path)

    def rollouts(self, kind: str | None = None) -> pa.Table:
        """All finished rollout shards, of one kind or of all, in order."""
        prefixes = [kind] if kind else ["base", "hindsight", "repair"]
        names = [n for p in prefixes for n in sorted(self.manifest["shards"]) if n.startswith(f"rollouts/{p}-")]
        tables = [self.read(name) for name in names]
        return pa.concat_tables(tables) if tables else ROLLOUTS.empty_table()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises InputError where it is not what was written."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest.pop("sha256") == digest(manifest) and _well_formed(manifest)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{path}: damaged (not what was written)")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has the parts that are read here, and names files of the directory alone: it may come with a
    directory from elsewhere, and what it names is read, renamed and written.
    """
    tables = [manifest[name] for name in ("stages", "shards")]
    tables += [manifest.get(name, {}) for name in ("files", "inputs", "work", "models")]
    inner = [part for table in (tables[0], *tables[2:]) for part in table.values()]
    models = tables[-1]
    sums = [tables[1], *tables[2].values(), *(model.get("files", {}) for model in models.values())]
    names = [name for table in sums for name in table]
    return (
        all(isinstance(part, dict) for part in (*tables, *inner, *sums))
        and all(isinstance(model["path"], str) and isinstance(model["sha256"], str) for model in models.values())
        and set(models) <= {"teacher", "student"}
        and isinstance(manifest.get("also", []), list)
        and all(isinstance(recorded, str) for table in sums for recorded in table.values())
        and all(not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name for name in names)
        and all(0 < len(part) < 200 for name in names for part in name.split("/"))
    )
