"""Where problems come from: every source is a sequence of problems by index, and `load` takes its part of it.

| source | options | which problems, in which order |
| --- | --- | --- |
| world:NAME | | `counts` of each level that `seed` draws from the hash split `split`; sums, rewriting, legs |
| rg:FAMILY | the family's | draws `skip` to `skip` + `limit` (0: 100) of `seed`, without repeats |
| jsonl:FILE, parquet:FILE | | rows `skip` to `skip` + `limit` (0: all), in the file's order |
| tfds:NAME, tfds_dir:FOLDER | split | the same, in the order of the prepared set |
| hf:NAME | split, name, revision | the same, in the set's order |

`split` is the label of the problems; tfds:, tfds_dir: and hf: read the split of that name where `options` gives none.
`seed` has no meaning for files and sets: nothing is shuffled. Of rows after the first `skip` those that repeat a
question among them are left out, too, so that two parts of one source share no question.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from heal_jax.config import ProblemSpec
from heal_jax.errors import InputError
from heal_jax.problems import families, tables
from heal_jax.problems.scorers import choice_letter
from heal_jax.problems.text import field_text, near, short

RG_SIZE = 100  # problems of a reasoning-gym family where no limit is given
NAMED = 10  # bad rows that are named in one message

TABLES = {
    "jsonl": tables.json_lines,
    "parquet": tables.parquet,
    "tfds": tables.tfds,
    "tfds_dir": tables.tfds_folder,
    "hf": tables.hugging_face,
}
OPTIONS = {"tfds": ("split",), "tfds_dir": ("split",), "hf": ("split", "name", "revision")}
FIELDS = ("question", "answer", "id", "level")


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    id: str
    """Unique within its source and split."""
    source: str
    """As in the config: world:sums, rg:FAMILY, jsonl:FILE, ..."""
    split: str
    level: str
    """A label of difficulty, or empty."""
    question: str
    answer: str
    scorer: str
    """reasoning_gym, math, exact or choice."""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """reasoning_gym: the entry's own, with source_dataset (the family) and source_options (its configuration)."""
    place: str = field(default="", hash=False, compare=False)
    """Where a user finds it: mine.jsonl:3, tfds:gsm8k train row 7."""


class Source(Protocol):
    """Random access, as Grain's sources have it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


def load(spec: ProblemSpec, by: str, where: str = "problems") -> list[Problem]:
    """The problems that a config asks for, in the source's order; ids are unique, questions need not be.

    `by` is `grade.by`: auto takes the family's own scorer for world: and rg:, math for the others. Raises InputError,
    which names fields under `where`, the place of `spec` in the config, and bad rows by file and line.
    """
    try:
        source = open_source(spec, by)
        end = min(len(source), spec.skip + spec.limit) if spec.limit else len(source)
        problems = _read(source, end) if isinstance(source, TableProblems) else [source[i] for i in range(end)]
        seen = {_key(problem.question) for problem in problems[: spec.skip]}
        left = []
        for problem in problems[spec.skip :]:
            if (key := _key(problem.question)) not in seen:
                left.append(problem)
                if spec.source.startswith("rg:"):  # a generator's repeats are nobody's data
                    seen.add(key)
        if not left:
            raise InputError(
                f"problems.skip: {spec.skip}: {spec.source} holds {len(source)} problems and none that is not among "
                "those left out; lower it"
                if spec.skip
                else f"{spec.source}: holds no problems"
            )
        return left
    except InputError as error:
        raise InputError(re.sub(r"^problems\b", where, str(error))) from None


def at_hand(spec: ProblemSpec) -> bool:
    """Whether the problems can be read on this machine without fetching anything."""
    scheme, _, name = spec.source.partition(":")
    if scheme in ("jsonl", "parquet"):
        return Path(name).expanduser().is_file()
    if scheme in ("tfds_dir", "hf"):
        return Path(name).expanduser().is_dir()
    return scheme != "tfds" or tables.prepared(name) is not None


def open_source(spec: ProblemSpec, by: str) -> Source:
    scheme, _, name = spec.source.partition(":")
    if scheme not in ("world", "rg", *TABLES) or not name:
        raise InputError(
            f"problems.source: {spec.source!r}: world:NAME, rg:FAMILY, jsonl:FILE, parquet:FILE, tfds:NAME, "
            "tfds_dir:FOLDER or hf:NAME is expected"
        )
    made = scheme in ("world", "rg")
    if by == "reasoning_gym" and not made:
        raise InputError(f"grade.by: reasoning_gym has no scorer for {spec.source}; use math, exact or choice")
    for unused, given, instead in (
        ("counts", spec.counts and scheme != "world", "limit"),
        ("limit", spec.limit and scheme == "world", "counts"),
        ("skip", spec.skip and scheme == "world", "split"),
        ("seed", spec.seed and not made, "a shuffled file, or skip"),
        ("fields", spec.fields and made, "a file"),
        ("answer_pattern", spec.answer_pattern and made, "a file"),
        ("options", spec.options and scheme in ("world", "jsonl", "parquet"), "an rg:, tfds: or hf: source"),
    ):
        if given:
            raise InputError(f"problems.{unused}: has no meaning for {spec.source}; use {instead}")
    if by == "auto":
        by = "reasoning_gym" if made else "math"
    if scheme == "world":
        return _world(spec, name, by)
    return _reasoning_gym(spec, name, by) if scheme == "rg" else TableProblems(spec, scheme, name, by)


class TableProblems:
    """The rows of a table as problems. An index raises InputError for a row that is none, with its place."""

    def __init__(self, spec: ProblemSpec, scheme: str, name: str, scorer: str) -> None:
        self.spec, self.scorer = spec, scorer
        for field_name in spec.fields:
            if field_name not in FIELDS:
                raise InputError(f"problems.fields.{field_name}: no field of a problem{near(field_name, FIELDS)}")
        self.pattern = _pattern(spec.answer_pattern)
        for option, value in spec.options.items():
            if option not in OPTIONS[scheme]:
                advice = near(option, OPTIONS[scheme])
                raise InputError(f"problems.options.{option}: no option of {spec.source}{advice}")
            if not isinstance(value, str):
                raise InputError(f"problems.options.{option}: {value!r} is not text")
        self.columns = {field_name: spec.fields.get(field_name, field_name) for field_name in FIELDS}
        self.table = TABLES[scheme](name, spec.split, spec.options, self.columns.values())
        if self.table.columns is not None:
            for field_name in ("question", "answer", *spec.fields):
                if (column := self.columns[field_name]) not in self.table.columns:
                    there = ", ".join(map(repr, self.table.columns)) or "nothing"
                    raise InputError(
                        f"{self.table.place}: no column {column!r} (there is: {there}); "
                        f"problems.fields.{field_name} says which it is"
                    )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Problem:
        place, spec = self.table.where(index), self.spec
        try:
            row = self.table[index]
            question, answer = field_text(row, self.columns["question"]), self._answer(row)
            id = f"{self.table.stem}-{spec.split}-{self.table.number(index)}"
            if self._given(row, "id"):
                id = field_text(row, self.columns["id"], number=True)
            level = field_text(row, self.columns["level"], True, True) if self._given(row, "level") else ""
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        return Problem(id, spec.source, spec.split, level, question, answer, self.scorer, place=place)

    def _given(self, row: Mapping[str, Any], name: str) -> bool:
        """Whether a row has an optional field; one that the config names may be null and must be there."""
        column = self.columns[name]
        return row.get(column) is not None or (name in self.spec.fields and column not in row)

    def _answer(self, row: Mapping[str, Any]) -> str:
        column = self.columns["answer"]
        answer = field_text(row, column, number=True)
        if self.pattern is not None:
            match = self.pattern.search(answer)
            if match is None or not (match[1] or "").strip():
                what = "does not match" if match is None else "has nothing in the group of"
                raise InputError(f"{column!r} {what} problems.answer_pattern: {short(answer)!r}")
            answer = match[1].strip()
        if self.scorer == "choice" and choice_letter(answer) is None:
            raise InputError(f"{column!r} is {short(answer)!r}; grade.by: choice expects a letter, such as B")
        return answer


def _read(source: TableProblems, end: int) -> list[Problem]:
    """The first `end` problems. Raises InputError for bad rows: what is wrong with the first, and which others are."""
    out: list[Problem] = []
    ids: dict[str, int] = {}
    wrong: list[tuple[int, InputError]] = []
    for index in range(end):
        number = source.table.number(index)
        try:
            problem = source[index]
            if problem.id in ids:
                unit = "row" if source.table.lines is None else "line"
                raise InputError(f"{problem.place}: the same id {problem.id!r} as in {unit} {ids[problem.id]}")
            ids[problem.id] = number
            out.append(problem)
        except InputError as error:
            wrong.append((number, error))
    if wrong:
        others = [number for number, _ in wrong[1:]]
        named = ", ".join(map(str, others[:NAMED])) + (", ..." if len(others) > NAMED else "")
        raise InputError(f"{wrong[0][1]}" + (f" ({len(others)} more are refused: {named})" if others else ""))
    return out


def _pattern(text: str) -> re.Pattern[str] | None:
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"problems.answer_pattern: {short(text)!r} is not a regular expression ({error})") from None
    if not pattern.groups:
        raise InputError(f"problems.answer_pattern: {text!r} has no group; put the answer's part in parentheses")
    return pattern


def _world(spec: ProblemSpec, name: str, scorer: str) -> list[Problem]:
    from heal_jax.world.base import LEVELS
    from heal_jax.world.problems import SPLITS, take
    from heal_jax.world.worlds import WORLDS

    if name not in WORLDS:
        there = ", ".join(f"world:{known}" for known in WORLDS)
        raise InputError(f"problems.source: world:{name} is unknown, the built-in worlds are {there}")
    if spec.split not in SPLITS:
        raise InputError(f"problems.split: {spec.split!r} is unknown, use one of {', '.join(SPLITS)}")
    if not any(spec.counts.values()):
        raise InputError(f"problems.counts: world:{name} needs a number for each level, such as {{easy: 60, hard: 60}}")
    for level, count in spec.counts.items():
        if level not in LEVELS:
            raise InputError(f"problems.counts.{level}: unknown level{near(level, LEVELS)}")
        if count < 0:
            raise InputError(f"problems.counts.{level}: {count} is out of range, allowed: >= 0")
    metadata = {"source_dataset": WORLDS[name].family}
    stem, taken = f"{name}-{spec.split}-{spec.seed}", take(WORLDS[name], spec.split, spec.counts, spec.seed)
    return [
        Problem(id := f"{stem}-{index}", spec.source, spec.split, level, question, answer, scorer, metadata, id)
        for index, level, question, answer in taken
    ]


def _reasoning_gym(spec: ProblemSpec, family: str, scorer: str) -> list[Problem]:
    out = []
    entries = families.draw(family, spec.skip + (spec.limit or RG_SIZE), spec.seed, spec.options)
    for index, (question, answer, metadata) in enumerate(entries):
        metadata = {**metadata, "source_dataset": family, "source_options": spec.options}
        level = families.difficulty(metadata.get("difficulty"))
        id = f"{family}-{spec.split}-{spec.seed}-{index}"
        out.append(Problem(id, spec.source, spec.split, level, question, answer, scorer, metadata, id))
    return out


def _key(question: str) -> str:
    return " ".join(question.split())
