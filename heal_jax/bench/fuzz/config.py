"""Config files: whatever the bytes, `load` gives a config that is written and read back unchanged, or refuses."""

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from hypothesis import strategies as st

from heal_jax.bench.fuzz.mutate import VALUES, broken, edited
from heal_jax.bench.fuzz.watch import Failure, Kind
from heal_jax.config import Config, dump, load
from heal_jax.store import write_text
from heal_jax.strict import to_dict

VALID = to_dict(Config())
CHOICES = ("bfloat16", "test", "dev", "int8", "ratio", "random", "oracle", "shuffled", "constant", "exact", "</think>")
RIGHT = st.sampled_from(CHOICES) | st.integers(1, 64) | st.floats(0, 1) | st.booleans()
RIGHT |= st.sampled_from(("rg:chain_sum", "jsonl:mine.jsonl", "1e-5", {"easy": 3}, [0.5, 0.25, 0.25], ["a"]))
# One more line of a mapping, each something that YAML can say and a config should not, or need not.
LINES = (
    "seed: 1", "seed: *a", "seed: &a [*a]", "x: !!python/object/apply:os.system [id]", "seed: !!int abc",
    "seed: 2001-13-45", "seed: 2001-01-01", "seed: 0x" + "f" * 5000, "seed: " + "9" * 5000, "seed: 1:99:99",
    "seed: !!timestamp x", "seed: !!bool maybe", "seed: !!binary é", "seed: !!set {a}", "seed: !!float ''",
    "? [a]\n: b", "? {a: b}\n: c", "<<: {seed: 3}", "<<: [1]", "problems: !!map 3", "!!seq seed: 3", "? !!map x\n: 1",
    "---", "...", "%YAML 9.9", "%TAG ! x", "\tseed: 1", "problems: {options: {a: &a [1], b: *a}}",
    "problems: {options: {a: &a [*a]}}", "problems: {options: {a: .nan}}", "problems: {options: {a: 2001-01-01}}",
    "problems: {options: {1: 2, !!set {a}: 3}}", "problems: {options: {a: !!binary aGk=}}",
    "log: {project: \"\\ud800\"}",
    "log: {project: \"\\0\\x85\\u2028\"}", "gear: {hint: \"{answer}\\r\\n\"}", "seed: [" + "[" * 3000,
    "seed: " + "{a: " * 3000, "- " * 3000 + "a", "null: 1", "1: 2", "true: 1", "~: ~", "seed: !!null 3",
    "gear: {leak_patterns: ['(']}", "gear: {leak_patterns: ['(a{99999}){99999}']}",
    "gear: {leak_patterns: ['" + "(" * 2000 + "']}",
)  # fmt: skip
LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


def _as_yaml(data: Any) -> bytes:
    return yaml.safe_dump(data, sort_keys=False, width=1000).encode()


def _fields(part: Any, *path: str) -> dict[tuple[str, ...], st.SearchStrategy]:
    """For every field of a part of the config values that it may have."""
    out: dict[tuple[str, ...], st.SearchStrategy] = {}
    for name, hint in typing.get_type_hints(type(part)).items():
        value, where = getattr(part, name), (*path, name)
        if dataclasses.is_dataclass(value):
            out |= _fields(value, *where)
        elif typing.get_origin(hint) is Literal:
            out[where] = st.sampled_from(typing.get_args(hint))
        elif isinstance(value, str):
            out[where] = st.text(max_size=6).map(value.__add__)
        elif isinstance(value, int | float):
            out[where] = st.integers(0, 400) if hint is int else st.floats(0, 1)
        elif hint == dict[str, Any]:
            out[where] = st.dictionaries(st.text(max_size=3), VALUES, max_size=2)
    return out


FIELDS = _fields(Config())


@st.composite
def _right(draw: st.DrawFn) -> bytes:
    """A file of a few fields that are mostly right."""
    data: dict[str, Any] = {}
    for *way, last in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4)):
        part = data
        for name in way:
            part = part.setdefault(name, {})
        part[last] = draw(FIELDS[*way, last])
    return _as_yaml(data)


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    """Lines of a valid file, with some that are not."""
    valid = _as_yaml(draw(edited(VALID, RIGHT, 2))).decode().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        line = draw(st.sampled_from(LINES))
        at = draw(st.integers(0, len(valid)))
        valid[at:at] = [" " * draw(st.sampled_from((0, 0, 2))) + line]
    return "\n".join(valid).encode()


@st.composite
def _few(draw: st.DrawFn) -> bytes:
    """A file of a few fields, as users write them."""
    names = draw(st.lists(st.sampled_from(sorted(VALID)), max_size=4))
    return _as_yaml(draw(edited({name: VALID[name] for name in names}, RIGHT | VALUES)))


FILES = st.one_of(
    _right(),
    _right(),
    _few(),
    edited(VALID, RIGHT).map(_as_yaml),
    edited(VALID, RIGHT | VALUES, 2).map(_as_yaml),
    _lines(),
    broken(_as_yaml(VALID)),
    st.lists(st.sampled_from(LINES), max_size=3).map(lambda lines: "\n".join(lines).encode()),
    st.sampled_from((LAUGHS, f"problems: {{options: {{a: 1}}}}\n{LAUGHS}", f"{LAUGHS}\nseed: *a29")).map(str.encode),
    st.text(st.sampled_from("ab:{}[]&*!|>-?#'\"% \n\t,1~<."), max_size=40).map(str.encode),
    st.binary(max_size=60),
)


def attempt(case: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(case)
    config = load(path)
    again = folder / "resolved.yaml"
    write_text(again, dump(config))
    if load(again) != config:
        raise Failure("a config is read back as another")


def culprits(case: bytes, folder: Path) -> tuple[str, ...]:
    return (f"{folder / 'config.yaml'}: ",)


def make(base: Path, run: Path) -> Kind:
    return Kind("config", b"seed: 1", FILES, attempt, culprits)
