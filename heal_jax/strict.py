"""Strict YAML into dataclasses, and dataclasses into plain data: an unknown key, a wrong type or a value out of range
is one line with the path, the value and what is allowed.
"""

import contextlib
import dataclasses
import difflib
import math
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from heal_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number: ge <= value <= le, gt < value."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    def __str__(self) -> str:
        low = f">= {self.ge}" if self.ge is not None else f"> {self.gt}" if self.gt is not None else ""
        high = f"<= {self.le}" if self.le is not None else ""
        return " and ".join(part for part in (low, high) if part)

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
        )


LARGEST = 1 << 17  # bytes of a config file; more takes seconds to read
MOST_VALUES, DEEPEST = 10_000, 50  # of a file with its aliases written out
LARGEST_INTEGER = 2**63 - 1
PLAIN = "text, finite numbers, true, false, null, lists and mappings with text keys"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses what plain YAML lets pass: a key given twice, where the last one would win, and aliases
    that grow without end."""

    def construct_document(self, node: yaml.Node) -> Any:
        _written_out(node, {}, 0)
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):  # such as !!int abc, or 2001-13-45
            kind = node.tag.rpartition(":")[2]
            raise InputError(f"line {node.start_mark.line + 1}: {shown(node.value)} is no {kind}") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # such as !!map 3
            raise InputError(f"line {node.start_mark.line + 1}: {shown(node.value)} is not a mapping")
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{_name(key)}: given twice (line {node.start_mark.line + 1} on); keep one")
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """How many values a node stands for. Raises InputError for too many, and for aliases of what they are in."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        parts: list[Any] = [] if isinstance(node, yaml.ScalarNode) else node.value
        inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes, depth + 1) for part in inner)
    size = sizes[id(node)]
    if size is None or size > MOST_VALUES or depth > DEEPEST:
        what = "an alias of what it is in" if size is None else "too many or too deeply nested values"
        raise InputError(f"line {node.start_mark.line + 1}: {what}; a config is short")
    return size


def shown(value: Any) -> str:
    """A value as messages show it: cut short."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 10


def _name(key: Any) -> str:
    return key if isinstance(key, str) and len(key) <= 80 else shown(key)


def read(path: Path, default: T) -> T:
    """`default`, a dataclass, with the fields that a YAML file gives. Raises InputError (one line)."""
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1).decode()
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    if len(text) > LARGEST:
        raise InputError(f"{path}: more than {LARGEST >> 10} KiB; a config is short")
    try:
        raw = yaml.load(text, _Loader)
        return _build_dataclass(default, {} if raw is None else raw, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from None


def override(default: T, values: Mapping[str, Any]) -> T:
    """`default`, a dataclass, with fields given as YAML has them or by path: {"sample": {"n": 8}}, {"sample.n": 8}.
    Raises InputError (one line)."""
    for path, value in values.items():
        for name in reversed(str(path).split(".")):
            value = {name: value}
        default = _build_dataclass(default, value, "")
    return default


def to_dict(value: Any) -> Any:
    """Plain data of a dataclass; `read` takes it back to an equal one."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to {dotted path: value}."""
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    return {key: leaf for name, item in data.items() for key, leaf in flatten(item, _join(prefix, str(name))).items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def check(value: Any, path: str) -> None:
    """Ranges and choices of every field of a dataclass, and of those in it. Raises InputError."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        item, hint, where = getattr(value, field.name), hints[field.name], _join(path, field.name)
        for place, part in item.items() if isinstance(item, dict) else [("", item)]:
            if dataclasses.is_dataclass(part):
                check(part, _join(where, str(place)) if place else where)
        if typing.get_origin(hint) is Literal:
            _build(hint, item, where)
        for bound in getattr(hint, "__metadata__", ()):
            if isinstance(bound, Range) and not bound.holds(item):
                raise InputError(f"{where}: {shown(item)} is out of range, allowed: {bound}")


def _build(hint: Any, raw: Any, path: str) -> Any:
    """Turn YAML data into a value of the hinted type, or raise InputError with the path."""
    if typing.get_origin(hint) is Annotated:
        return _build(typing.get_args(hint)[0], raw, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if raw in args and isinstance(raw, str):
            return raw
        raise InputError(f"{path}: {shown(raw)} is not allowed, use one of {', '.join(map(str, args))}")
    if origin is tuple:
        if not isinstance(raw, list) or (args[-1] is not Ellipsis and len(raw) != len(args)):
            length = "" if args[-1] is Ellipsis else f" of {len(args)} values"
            raise InputError(f"{path}: {shown(raw)} is not a list{length}")
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else list(args)
        return tuple(_build(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, raw)))
    if origin is dict:
        if not isinstance(raw, dict):
            raise InputError(f"{path}: {shown(raw)} is not a mapping")
        return {_build(args[0], key, path): _build(args[1], item, _join(path, _name(key))) for key, item in raw.items()}
    if hint is Any:
        return _plain(raw, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build_dataclass(hint(), raw, path)
    return _scalar(hint, raw, path)


def _plain(raw: Any, path: str) -> Any:
    """Data of any form. Raises InputError for what is written and read back as something else."""
    if isinstance(raw, list):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(raw)]
    if isinstance(raw, dict):
        return {_scalar(str, key, path): _plain(item, _join(path, _name(key))) for key, item in raw.items()}
    if raw is None or (isinstance(raw, float) and math.isfinite(raw)):
        return raw
    if type(raw) in (str, int, bool):
        return _scalar(type(raw), raw, path)
    raise InputError(f"{path}: {shown(raw)} is not plain data: {PLAIN}")


def _scalar(hint: type, raw: Any, path: str) -> Any:
    if isinstance(raw, int) and abs(raw) > LARGEST_INTEGER:
        raise InputError(f"{path}: {shown(raw)} is out of range: it has more than 64 bits")
    if isinstance(raw, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in raw):
        raise InputError(f"{path}: {shown(raw)} holds a NUL or half a surrogate pair, which no file can")
    if hint is float and isinstance(raw, str):  # YAML 1.1 reads 1e-5 (no point) as text
        with contextlib.suppress(ValueError):
            raw = float(raw)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if isinstance(raw, hint) and not (hint is not bool and isinstance(raw, bool)):
        return raw
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise InputError(f"{path}: {shown(raw)} is not {names[hint]}")


def _build_dataclass(default: Any, raw: Any, path: str) -> Any:
    """`default` with the fields that `raw` gives: what is left out keeps the default of where it stands."""
    if not isinstance(raw, dict):
        raise InputError(f"{path or 'config'}: {shown(raw)} is not a mapping of field: value")
    hints = typing.get_type_hints(type(default), include_extras=True)
    fields = [field.name for field in dataclasses.fields(default)]
    given = {}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(fields)}"
            raise InputError(f"{_join(path, _name(key))}: unknown key, {advice}")
        value, where = getattr(default, key), _join(path, key)
        given[key] = (
            _build_dataclass(value, raw[key], where)
            if dataclasses.is_dataclass(value)
            else _build(hints[key], raw[key], where)
        )
    return dataclasses.replace(default, **given)
