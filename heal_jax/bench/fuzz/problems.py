"""Problem files: what is loaded are problems with a question, an answer and an id of their own, or the file, and the
line or row, is named."""

import contextlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from heal_jax.bench.fuzz.mutate import NUMBERS, VALUES, WORDS, as_json, broken, edited, json_files
from heal_jax.bench.fuzz.watch import Failure, Kind
from heal_jax.config import ProblemSpec
from heal_jax.problems.sources import load

ROWS = [{"id": f"p{i}", "question": f"What is {i} + {i}?", "answer": 2 * i, "level": "easy"} for i in range(1, 5)]
TEXTS = st.sampled_from((*WORDS, "<script>", "\u202etxt", " ", "\ufeff", "\n\n", "\\boxed{}", "$\\frac{1}{0}$", "p1"))
LINES = (
    b"", b" \t\r", b"{}", b"[]", b"null", b'"', b'{"question": "a"', b'{"question": "a", "answer": 1}{}',
    b"\xef\xbb\xbf{}",
    b'{"question": "a", "question": "b", "answer": NaN}', b'{"question": "a", "answer": 1e999999999}', b"[" * 3000,
    b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", b'{"question": "a", "answer": -1e-400}', b'{"a": ' * 3000,
    b'{"question": "\\ud800", "answer": 1}', b'{"question": "\x00", "answer": 1}',
    b'{"question": "\\u0000", "answer": 1}',
    b'{"question": "a", "answer": 0.1e1, "id": -0.0}', b'{"question": "a", "answer": "b", "id": true, "level": []}',
    b'{"question": "\\u2028\\u0085", "answer": "1"}', b'{"question": "\xc2\x85", "answer": "1"}',
)  # fmt: skip
COLUMNS = (
    pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(),
    pa.decimal128(38, 9),
    pa.bool_(), pa.date32(), pa.timestamp("ns"), pa.timestamp("ns", "Nowhere/Else"), pa.duration("s"), pa.null(),
    pa.list_(pa.string()), pa.struct([("a", pa.string())]), pa.dictionary(pa.int32(), pa.string()), pa.string_view(),
)  # fmt: skip
OPTIONS = st.dictionaries(
    st.sampled_from(("split", "split", "a")),
    st.sampled_from(("train", "train[:1]", "x[", "[", "\x00")) | VALUES,
    max_size=1,
)
MAPPED = st.dictionaries(
    st.sampled_from(("question", "answer", "id", "level", "x")),
    st.sampled_from(("question", "answer", "id", "\x00")),
    max_size=2,
)
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.integers(0, 5),
        "skip": st.integers(0, 3),
        "fields": MAPPED,
        "answer_pattern": st.sampled_from(
            (r"(\d+)", "(.+)", "(", "x", "()", "(" * 2000, "(x)?", "(?P<a>.)", "((((a*)*)*)*)*b")
        ),
    },
)


@dataclass(frozen=True)
class Problems:
    """scheme: of the source; data: the file's bytes, or the files that differ from a prepared set's (None: gone)."""

    scheme: str
    data: Any
    by: str = "auto"
    spec: dict[str, Any] = field(default_factory=dict)


def _lines(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    rows = edited(ROWS, VALUES | TEXTS, 2).map(
        lambda rows: [as_json(row) for row in rows] if isinstance(rows, list) else []
    )
    odd: st.SearchStrategy[list[bytes]] = st.just([]) | st.lists(st.sampled_from((*valid, *LINES)), max_size=2)
    parts = st.tuples(rows | st.just(valid), odd, st.sampled_from((b"\n", b"\n", b"\r\n", b"\r", b"\xe2\x80\xa8")))
    return parts.map(lambda part: part[2].join([*part[0], *part[1]]))


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values as they are, as text, or nulls: what the type can hold."""
    for there in (values, [str(value) for value in values]):
        with contextlib.suppress(pa.ArrowException, ValueError, TypeError, OverflowError):
            return pa.array(there, kind)
    return pa.nulls(len(values), kind)


@st.composite
def _table(draw: st.DrawFn) -> bytes:
    """A Parquet file whose columns may be of any type."""
    count = draw(st.sampled_from((0, 1, 2, 3, 4, 4)))
    names = draw(st.permutations(("question", "answer", "id", "level")))[: draw(st.integers(2, 4))]
    arrays = []
    for name in names:
        values = [row[name] for row in ROWS[:count]]
        if draw(st.booleans()):
            values = [draw(TEXTS | st.sampled_from(NUMBERS) | st.none()) for _ in values]
        kind = draw(st.sampled_from((pa.string(), pa.int64())) | st.sampled_from(COLUMNS))
        arrays.append(_column(values, kind))
    if draw(st.integers(0, 9)) == 0:
        names = ["question"] * len(names)
    file = io.BytesIO()
    with contextlib.suppress(pa.ArrowException):
        pq.write_table(pa.Table.from_arrays(arrays, names=names), file, row_group_size=2)
    data = file.getvalue()
    return draw(broken(data)) if data and draw(st.integers(0, 2)) == 0 else data


class Reader:
    """Reads a case; `prepared`: the files of a set of tensorflow-datasets."""

    def __init__(self, prepared: dict[str, bytes]):
        self.prepared = prepared

    def source(self, case: Problems, folder: Path) -> Path:
        return folder / f"mine.{case.scheme}"

    def __call__(self, case: Problems, folder: Path) -> None:
        path = self.source(case, folder)
        if case.scheme == "tfds_dir":
            path.mkdir()
            for name, data in (self.prepared | case.data).items():
                if data is not None:
                    (path / name).write_bytes(data)
        else:
            path.write_bytes(case.data)
        problems = load(ProblemSpec(source=f"{case.scheme}:{path}", **case.spec), case.by)
        ids = [problem.id for problem in problems]
        if not problems or len(set(ids)) != len(ids):
            raise Failure("no problems, or ids that are not unique")
        for problem in problems:
            if not problem.question.strip() or not problem.answer.strip() or not problem.id:
                raise Failure(f"a problem without question, answer or id: {problem!r}")
            "".join((problem.question, problem.answer, problem.id, problem.level)).encode()  # as a file needs it

    def culprits(self, case: Problems, folder: Path) -> tuple[str, ...]:
        return f"{self.source(case, folder)}", *(f"problems.{name}" for name in case.spec)


def make(base: Path, run: Path) -> Kind:
    """The prepared set is a stage of the run's curriculum."""
    prepared = {path.name: path.read_bytes() for path in sorted((run / "curriculum" / "stage1").iterdir())}
    rows = [as_json(row) for row in ROWS]
    graders = st.sampled_from(("auto", "exact", "math", "choice"))
    mapped = {"fields": {"question": "rollout_id", "answer": "prompt_length", "id": "rollout_id"}}

    def told(options: dict[str, Any]) -> dict[str, Any]:
        return {**mapped, "options": options}

    texts = st.one_of(_lines(rows), _lines(rows), broken(b"\n".join(rows)), st.binary(max_size=60))
    cases = [
        st.builds(Problems, st.just("jsonl"), texts),
        st.builds(Problems, st.just("jsonl"), _lines(rows), graders, SPECS),
        st.builds(Problems, st.just("parquet"), _table()),
        st.builds(Problems, st.just("parquet"), _table() | st.binary(max_size=40), graders, SPECS),
        st.builds(Problems, st.just("tfds_dir"), _set(prepared), st.just("auto"), OPTIONS.map(told)),
    ]
    reader = Reader(prepared)
    return Kind("problems", Problems("jsonl", b"\n".join(rows)), st.one_of(cases), reader, reader.culprits)


def _set(prepared: dict[str, bytes]) -> st.SearchStrategy[dict[str, bytes | None]]:
    """Files of a prepared set that are broken or gone."""

    def file(name: str) -> st.SearchStrategy[bytes | None]:
        data = prepared[name]
        changed = json_files(json.loads(data)) if name.endswith(".json") else broken(data)
        return changed | st.none() | st.just(b"")

    some = st.sampled_from(sorted(prepared)).flatmap(lambda name: file(name).map(lambda data: {name: data}))
    return some | st.just({})
