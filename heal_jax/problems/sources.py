"""Where problems come from: the built-in world, reasoning-gym, JSON lines."""

import decimal
import difflib
import json
import random
import re
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from heal_jax.config import ProblemSpec
from heal_jax.errors import InputError, RunError
from heal_jax.problems import worker

RG_SIZE = 100  # problems of a reasoning-gym family where no limit is given
MAX_LEVEL = 60  # characters; a family's difficulty that is longer is no label


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    id: str
    """Unique within its source and split."""
    source: str
    """As in the config: world:sums, rg:FAMILY, jsonl:FILE."""
    split: str
    level: str
    """A label of difficulty, or empty."""
    question: str
    answer: str
    scorer: str
    """reasoning_gym, math or exact."""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """reasoning_gym: the entry's own, with source_dataset (the family) and source_options (its configuration)."""


def load(spec: ProblemSpec, by: str, where: str = "problems") -> list[Problem]:
    """The problems of a source, in its order, no question twice.

    `by` is `grade.by`: auto takes the family's own scorer for world: and rg:, math for jsonl:. Raises InputError, which
    names fields under `where`, the place of `spec` in the config.
    """
    try:
        return _load(spec, by)
    except InputError as error:
        raise InputError(re.sub(r"^problems\b", where, str(error))) from None


def _load(spec: ProblemSpec, by: str) -> list[Problem]:
    scheme, _, name = spec.source.partition(":")
    if scheme not in _LOADERS or not name:
        raise InputError(f"problems.source: {spec.source!r}: world:sums, rg:FAMILY or jsonl:FILE is expected")
    if by == "reasoning_gym" and scheme == "jsonl":
        raise InputError(f"grade.by: reasoning_gym has no scorer for {spec.source}; use math or exact")
    for unused, given, instead in (
        ("counts", spec.counts and scheme != "world", "limit"),
        ("limit", spec.limit and scheme == "world", "counts"),
        ("skip", spec.skip and scheme == "world", "split"),
        ("options", spec.options and scheme != "rg", "an rg: source"),
    ):
        if given:
            raise InputError(f"problems.{unused}: has no meaning for {spec.source}; use {instead}")
    if by == "auto":
        by = "math" if scheme == "jsonl" else "reasoning_gym"
    return _LOADERS[scheme](spec, name, by)


def check_disjoint(train: list[Problem], held_out: list[Problem]) -> None:
    """Raise InputError where a question is in both lists (white space does not count)."""
    known = {_key(problem.question): problem for problem in train}
    shared = [problem for problem in held_out if _key(problem.question) in known]
    if shared:
        first = shared[0]
        raise InputError(
            f"{len(shared)} of {len(held_out)} held-out problems are training problems too, the first is {first.id} "
            f"({known[_key(first.question)].id} in training): {_short(first.question)!r}; "
            "take another split, seed or file for one of the two"
        )


def _world(spec: ProblemSpec, name: str, scorer: str) -> list[Problem]:
    if name != "sums":
        raise InputError(f"problems.source: world:{name} is unknown, the built-in world is world:sums")
    from heal_jax.world import problems as world

    if spec.split not in world.SPLITS:
        raise InputError(f"problems.split: {spec.split!r} is unknown, use one of {', '.join(world.SPLITS)}")
    if not any(spec.counts.values()):
        raise InputError("problems.counts: world:sums needs a number for each level, such as {easy: 60, hard: 60}")
    for level, count in spec.counts.items():
        if level not in world.LEVELS:
            raise InputError(f"problems.counts.{level}: unknown level{_near(level, world.LEVELS)}")
        if count < 0:
            raise InputError(f"problems.counts.{level}: {count} is out of range, allowed: >= 0")
    metadata = {"source_dataset": world.FAMILY}
    stem, taken = f"{name}-{spec.split}-{spec.seed}", world.take(spec.split, spec.counts, spec.seed)
    return [
        Problem(f"{stem}-{index}", spec.source, spec.split, level, question, answer, scorer, metadata)
        for index, level, question, answer in taken
    ]


def _reasoning_gym(spec: ProblemSpec, family: str, scorer: str) -> list[Problem]:
    process, connection = worker.start(__name__, "generate")
    try:
        connection.send((family, spec.skip + (spec.limit or RG_SIZE), spec.seed, spec.options))
        entries = connection.recv()
    except (EOFError, OSError):
        raise RunError(f"{spec.source}: reasoning-gym ended without an answer; is it installed?") from None
    finally:
        connection.close()
        process.kill()
        process.wait()
    if isinstance(entries, str):
        raise InputError(entries)
    out, seen = [], set()
    for index, (question, answer, metadata) in enumerate(entries):
        if _key(question) in seen:
            continue
        seen.add(_key(question))
        if index < spec.skip:
            continue
        metadata = {**metadata, "source_dataset": family, "source_options": spec.options}
        level = _difficulty(metadata.get("difficulty"))
        id = f"{family}-{spec.split}-{spec.seed}-{index}"
        out.append(Problem(id, spec.source, spec.split, level, question, answer, scorer, metadata))
    if not out:
        raise InputError(f"problems.skip: {spec.skip}: {spec.source} has no question that is not among them; lower it")
    return out


def generate(connection: Connection) -> None:
    """In a child process: read (family, size, seed, options), write [(question, answer, metadata)] or what is wrong."""
    family, size, seed, options = connection.recv()
    try:
        connection.send(_entries(family, size, seed, options))
    except InputError as error:
        connection.send(str(error))


def _entries(family: str, size: int, seed: int, options: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise InputError(f"rg:{family}: reasoning-gym has no such family{_near(family, DATASETS)}")
    allowed = [field.name for field in fields(DATASETS[family][1]) if field.name not in ("size", "seed")]
    for name in options:
        if name not in allowed:
            advice = f", use problems.{'limit' if name == 'size' else name}" if name in ("size", "seed") else ""
            raise InputError(f"problems.options.{name}: no option of rg:{family}{advice or _near(name, allowed)}")
    try:
        data = reasoning_gym.create_dataset(family, size=size, seed=seed, **options)
    except Exception as error:
        reason = _short(str(error)) or type(error).__name__
        raise InputError(f"problems.options: rg:{family} refuses {options or 'its defaults'}: {reason}") from None
    out = []
    for index in range(size):
        random.seed(f"{seed} {index}")  # one family draws from the global generator
        try:
            entry = data[index]
        except Exception as error:
            reason = f"{type(error).__name__}: {_short(str(error))}"
            raise InputError(f"rg:{family}: problem {index} cannot be made with these options ({reason})") from None
        question, answer = entry["question"], entry["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(
                f"rg:{family}: problem {index} comes without an answer, and the hint must show one; use another family"
            )
        out.append((question, answer.strip(), entry["metadata"]))
    return out


def _difficulty(value: Any) -> str:
    """ "terms=2..6,digits=1..4", or empty where that would not be short."""
    parts = []
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, tuple | list) and len(item) == 2 and not name.endswith("weights"):
            item = f"{item[0]}..{item[1]}" if item[0] != item[1] else item[0]
        if isinstance(item, int | float | str):
            parts.append(f"{name}={item}")
    text = ",".join(parts) if isinstance(value, dict) else str(value) if isinstance(value, int | float | str) else ""
    return text if len(text) <= MAX_LEVEL else ""


def _json_lines(spec: ProblemSpec, name: str, scorer: str) -> list[Problem]:
    path = Path(name)
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: JSON text may hold other line separators
    except FileNotFoundError:
        raise InputError(f"{path}: no such problem file (relative to {Path.cwd()})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    out: list[Problem] = []
    ids: dict[str, int] = {}
    questions: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = _row(line)
            if row is None:
                continue
            question, answer = _text(row, "question"), _text(row, "answer", number=True)
            id = _text(row, "id", number=True) if "id" in row else f"{path.stem}-{spec.split}-{number}"
            level = _text(row, "level", number=True, empty=True) if "level" in row else ""
            for known, key, what in ((ids, id, f"id {id!r}"), (questions, _key(question), "question")):
                if key in known:
                    raise InputError(f"the same {what} as in line {known[key]}; each problem may be there once")
                known[key] = number
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        out.append(Problem(id, spec.source, spec.split, level, question, answer, scorer))
    if not out:
        raise InputError(f'{path}: holds no problems; one {{"question": ..., "answer": ...}} a line is expected')
    if len(out) <= spec.skip:
        raise InputError(
            f"problems.skip: {spec.skip}: {path} holds {len(out)} problems, so that none is left; lower it"
        )
    return out[spec.skip :][: spec.limit or None]


def _row(line: bytes) -> dict[str, Any] | None:
    """One line's object, None for a blank line."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from None
    if not text:
        return None
    try:
        row = json.loads(text, parse_float=decimal.Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"not JSON ({_short(str(error))}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise InputError(f"{_short(text)!r} is not an object; question and answer are expected")
    return row


def _text(row: dict[str, Any], name: str, number: bool = False, empty: bool = False) -> str:
    """A field's text without surrounding white space; numbers are written out where they are allowed."""
    if name not in row:
        raise InputError(f"no {name!r} (there is: {', '.join(map(repr, row)) or 'nothing'})")
    value = row[name]
    if number and isinstance(value, decimal.Decimal):
        if abs(value.adjusted()) > 50:
            raise InputError(f"{name!r} is a number too long to be written out; give it as text")
        value = format(value, "f")
    elif number and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = "text or a number" if number else "text"
        raise InputError(f"{name!r} is {_short(json.dumps(value, default=str))}; {kind} is expected")
    if not value.strip() and not empty:
        raise InputError(f"{name!r} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name!r} holds half a surrogate pair, which is not text")
    return value.strip()


def _key(question: str) -> str:
    return " ".join(question.split())


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _near(name: str, allowed: Any) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    return f", there are: {', '.join(allowed)}" if 0 < len(allowed) <= 20 else ""


_LOADERS = {"world": _world, "rg": _reasoning_gym, "jsonl": _json_lines}
