"""Which columns of a table of problems hold what, and how its answers are to be read: guessed from names and values."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heal_jax.config import By, ProblemSpec
from heal_jax.errors import InputError
from heal_jax.problems.answers import answer_span
from heal_jax.problems.sources import TABLES, TableProblems
from heal_jax.problems.tables import Table
from heal_jax.problems.text import field_text, short

# What columns are called in public sets of problems, the likeliest first.
NAMES = {
    "question": ("question", "problem", "prompt", "query", "instruction", "input", "question_text", "problem_text"),
    "answer": (
        *("answer", "final_answer", "expected_answer", "ground_truth", "gold", "target", "label", "correct_answer"),
        *("solution", "output", "response"),
    ),
    "id": ("id", "unique_id", "uuid", "problem_id", "question_id", "uid"),
    "level": ("level", "difficulty"),
}
# Where the answer column holds a whole solution: GSM8K's last line, MATH's box.
PATTERNS = (r"####\s*(.+)", r"(?s).*\\boxed\{(.*)\}")
BOXED = "\\boxed{", "}"
LETTER = re.compile(r"\W*[A-Z]\W*")
MOST = 20_000  # rows that are looked at
KEYS = 100  # rows of a file whose columns are looked for


def mapped(given: str, notes: list[str], split: str = "train") -> tuple[ProblemSpec, By]:
    """The `problems` of a config for a file, folder or source, and `grade.by`; `notes` gets what was guessed.

    Raises InputError where it is none, and where no column looks like the question or the answer.
    """
    source = spelled(given)
    scheme, _, name = source.partition(":")
    spec = ProblemSpec(source=source, split="train" if split == "train" else "test")
    if scheme not in TABLES:
        if scheme != "rg":
            raise InputError(f"{given}: no file or set of yours; the built-in world has configs/quickstart.yaml")
        return spec, "auto"
    table = TABLES[scheme](name, spec.split, {}, ())
    columns = table.columns
    if columns is None:
        columns = list(dict.fromkeys(key for i in range(min(KEYS, len(table))) for key in _row(table, i)))
    fields = {field: found for field in NAMES if (found := _column(field, columns))}
    for field in ("question", "answer"):
        if field not in fields:
            there = ", ".join(map(repr, columns)) or "nothing"
            raise InputError(f"{table.place}: no column looks like the {field} (there is: {there}); call one {field!r}")
    spec = dataclasses.replace(spec, fields={field: column for field, column in fields.items() if field != column})
    if spec.fields:
        notes.append(f"{table.place}: " + ", ".join(f"{f} is column {c!r}" for f, c in spec.fields.items()))
    # The rows as a run reads them.
    table = TableProblems(spec, scheme, name, "exact").table
    answers = []
    for i in range(min(MOST, len(table))):
        row = _row(table, i)
        try:
            answers.append(field_text(row, fields["answer"], number=True))
        except InputError as error:
            raise InputError(f"{table.where(i)}: {error}") from None
    if pattern := _pattern(answers, table.place):
        spec = dataclasses.replace(spec, answer_pattern=pattern)
        notes.append(f"{table.place}: the answer is what {pattern!r} finds in column {fields['answer']!r}")
    return spec, "choice" if answers and all(map(LETTER.fullmatch, answers)) else "auto"


def _row(table: Table, index: int) -> Mapping[str, Any]:
    try:
        return table[index]
    except InputError as error:
        raise InputError(f"{table.where(index)}: {error}") from None


def spelled(given: str) -> str:
    """A source as the config has it, from a path or such a source."""
    if given.partition(":")[0] in (*TABLES, "rg", "world"):
        return given
    path = Path(given).expanduser()
    if path.is_dir():
        return f"tfds_dir:{given}" if (path / "features.json").is_file() else f"hf:{given}"
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise InputError(
            f"{given}: a .jsonl or .parquet file, the folder of a set, or a source such as hf:NAME is expected"
        )
    return f"{kinds[path.suffix]}:{given}"


def _column(field: str, columns: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in NAMES[field] if name in lower), None)


def _pattern(answers: Sequence[str], place: str) -> str:
    """What finds the answer in solutions; empty where they are answers already."""
    for pattern in PATTERNS:
        found = [re.search(pattern, answer) for answer in answers]
        if sum(match is not None for match in found) <= len(answers) / 2:
            continue
        if not all(found):
            first = short(answers[next(i for i, match in enumerate(found) if match is None)])
            raise InputError(
                f"{place}: most answers are found by {pattern!r}, but not in {first!r}; mend or remove such rows"
            )
        if "boxed" in pattern and any(_boxed(a) != match[1] for a, match in zip(answers, found) if match):
            raise InputError(
                f"{place}: answers are in \\boxed{{}} among text that no pattern can part; give a column of their own"
            )
        return pattern
    return ""


def _boxed(text: str) -> str | None:
    span = answer_span(text, *BOXED, "")
    return None if span is None else text[span[0] : span[1]]
