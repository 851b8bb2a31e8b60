"""Tables that users bring, row by row: JSON lines, Parquet, tensorflow-datasets, the datasets package.

Nothing here imports TensorFlow or runs code that comes with the data. What a file is read with is imported when it is
read.
"""

import contextlib
import functools
import importlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from heal_jax.errors import InputError
from heal_jax.problems.text import short

TFDS_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.\-]+)?(:\d+\.\d+\.\d+)?")


class Rows(Protocol):
    """Random access, as Grain's sources have it: a row is read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Table:
    """Rows by index from 0: `table[i]` maps columns to values; it raises InputError (without the place)."""

    stem: str
    """What the ids of its problems begin with."""
    place: str
    """Where the rows are: a file, or a set and its split."""
    rows: Rows
    read: Callable[[Any], Mapping[str, Any]]
    columns: Sequence[str] | None = None
    """None where each row has its own."""
    lines: Sequence[int] | None = None
    """Line of each row in the file; None where rows are numbered, from 1."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.read(self.rows[index])

    def number(self, index: int) -> int:
        """The line or row number that users find a row by."""
        return index + 1 if self.lines is None else self.lines[index]

    def where(self, index: int) -> str:
        """mine.jsonl:3, mine.parquet row 3."""
        return f"{self.place}{' row ' if self.lines is None else ':'}{self.number(index)}"


def json_lines(name: str, split: str, options: Mapping[str, str], wanted: Collection[str]) -> Table:
    """One JSON object a line; blank lines do not count. Raises InputError, as all of these functions do."""
    path = Path(name).expanduser()
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: JSON text may hold other line separators
    except OSError as error:
        raise _unreadable(path, error) from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip(b" \t\r\xef\xbb\xbf")]
    if not filled:
        raise InputError(f'{path}: holds no problems; one {{"question": ..., "answer": ...}} a line is expected')
    return Table(path.stem, str(path), [line for _, line in filled], _object, lines=[number for number, _ in filled])


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from None
    try:
        row = json.loads(text, parse_float=Decimal)  # the digits as they are written
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"not JSON ({short(str(error))}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise InputError(f"{short(text)!r} is not an object; question and answer are expected")
    return row


def parquet(name: str, split: str, options: Mapping[str, str], wanted: Collection[str]) -> Table:
    """One Parquet file; of its columns those that are wanted are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(name).expanduser()
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            data = file.read(columns=[column for column in columns if column in wanted])
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    if twice := [column for column in data.column_names if data.column_names.count(column) > 1]:
        raise InputError(f"{path}: two columns are named {short(twice[0])!r}; keep one")
    held = {column: data.column(column) for column in data.column_names}

    def read(index: int) -> dict[str, Any]:
        return {column: values[index].as_py() for column, values in held.items()}

    return Table(path.stem, str(path), range(data.num_rows), _guarded(read), columns)


def tfds(name: str, split: str, options: Mapping[str, str], wanted: Collection[str]) -> Table:
    """NAME, NAME/CONFIG or NAME/CONFIG:VERSION. A set that is not prepared in tensorflow-datasets' folder yet is
    prepared there, as ArrayRecord, which for most sets downloads."""
    builder = prepared(name)
    return _data_source(builder if builder is not None else _prepare(name), f"tfds:{name}", options.get("split", split))


def tfds_folder(name: str, split: str, options: Mapping[str, str], wanted: Collection[str]) -> Table:
    """The folder of a prepared set (the one that holds features.json)."""
    folder = Path(name).expanduser()
    features = folder / "features.json"
    if not features.is_file():
        raise InputError(f"{folder}: no prepared set here (no features.json, relative to {Path.cwd()})")
    with _library(folder):
        # It may be somebody else's: its features are classes by name, whose modules would be imported.
        if foreign := [
            name for name in _classes(features) if not name.startswith("tensorflow_datasets.core.features.")
        ]:
            raise InputError(
                f"{features}: {short(foreign[0])} is no feature of tensorflow-datasets; write the set anew"
            )
        builder = _quiet_tfds().builder_from_directory(folder)
    return _data_source(builder, str(folder), options.get("split", split))


def _classes(features: Path) -> list[str]:
    """Every class that a features.json names."""
    found: list[str] = []

    def note(node: dict[str, Any]) -> dict[str, Any]:
        found.extend(node[key] for key in ("pythonClassName", "type") if isinstance(node.get(key), str))
        return node

    json.loads(features.read_text(encoding="utf-8"), object_hook=note)
    return found


def prepared(name: str) -> Any:
    """The builder of a set that lies prepared on this machine, or None."""
    if not TFDS_NAME.fullmatch(name):
        raise InputError(f"problems.source: tfds:{name}: NAME, NAME/CONFIG or NAME/CONFIG:1.0.0 is expected")
    library = _quiet_tfds()
    with _library(f"tfds:{name}"):
        try:
            return library.core.read_only_builder.builder_from_files(name)
        except library.core.registered.DatasetNotFoundError:
            return None


def _prepare(name: str) -> Any:
    from filelock import FileLock

    library = _quiet_tfds()
    for module in ("question_answering", "text"):
        # It stops importing its own sets at the first that lacks a package (h5py), before it comes to these.
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{module}")
    try:
        builder = library.builder(name)
        root = Path(builder.data_dir_root).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{builder.name}.lock"), contextlib.redirect_stdout(io.StringIO()):
            if (there := prepared(name)) is not None:  # by another process, meanwhile
                return there
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise InputError(
            f"tfds:{name}: not prepared on this machine, and cannot be now ({_said(error)}); prepare it with "
            f"`tfds build {name} --file_format=array_record`, or name a prepared folder with tfds_dir:"
        ) from None
    return builder


def _data_source(builder: Any, place: str, split: str) -> Table:
    """A split of a prepared set: text as bytes, numbers as NumPy's."""
    with _library(place):
        _one_of(re.split(r"[\[+]", split)[0], list(builder.info.splits), place)
        try:
            rows = builder.as_data_source(split=split)
        except NotImplementedError:
            raise InputError(
                f"{place}: stored as {builder.info.file_format.value}, which cannot be read by row; prepare it again "
                "with --file_format=array_record"
            ) from None
        columns = list(builder.info.features)
    # The index is what is asked for, so that an error while reading is that row's.
    return Table(builder.info.name, f"{place} {split}", range(len(rows)), _guarded(rows.__getitem__), columns)


def hugging_face(name: str, split: str, options: Mapping[str, str], wanted: Collection[str]) -> Table:
    """A set of the Hugging Face hub, or a local folder, through the datasets package."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{name}: needs the datasets package: pip install 'heal-jax[hf]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    folder, split = Path(name).expanduser(), options.get("split", split)
    with _library(f"hf:{name}"):
        data = datasets.load_dataset(
            str(folder) if folder.is_dir() else name,
            options.get("name"),
            split=split,
            revision=options.get("revision"),
        )
        columns = data.column_names
        data = data.select_columns([column for column in columns if column in wanted])
    stem = re.sub(r"[^\w.-]+", "-", folder.name if folder.is_dir() else name)
    return Table(stem, f"hf:{name} {split}", range(len(data)), _guarded(data.__getitem__), columns)


@functools.cache
def _quiet_tfds() -> Any:
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    return tensorflow_datasets


@contextlib.contextmanager
def _library(place: object) -> Iterator[None]:
    """What another library says of a set, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of many kinds: names, files, networks
        raise InputError(f"{place}: cannot be read ({_said(error)})") from None


def _guarded(read: Callable[[int], Mapping[str, Any]]) -> Callable[[int], Mapping[str, Any]]:
    def row(index: int) -> Mapping[str, Any]:
        try:
            return read(index)
        except Exception as error:
            raise InputError(f"cannot be read ({_said(error)}); is the file damaged?") from None

    return row


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such problem file (relative to {Path.cwd()})")
    return InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or _said(error)})")


def _said(error: Exception) -> str:
    return short(f"{type(error).__name__}: {error}", 200)


def _one_of(split: str, splits: Sequence[str], place: str) -> None:
    if split not in splits:
        raise InputError(f"{place}: no split {split!r}; set problems.options.split to one of {', '.join(splits)}")
