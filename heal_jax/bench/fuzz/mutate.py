"""Strategies that break valid input: values of other types, JSON with fields changed, bytes changed."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

WORDS = ("", "null", "\x00", "\ud800", "\u202e<b>\u2028", "../../x", "/etc/passwd", "a" * 5000, "%s{0}{question}")
NUMBERS = (0, 1, 2, 3, 8, 64, -1, 2**31, 2**63, -(10**30), 10**400, 0.5, 1.0, -0.0, 1e308, 1e-320)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(NOT_FINITE), st.sampled_from(WORDS),
    st.integers(-10, 300), st.floats(0, 2), st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("", "a", "1", "\ud800")), inner),
    max_leaves=4,
)
KEYS = st.sampled_from(("", "a", "__class__", "auto_map", "\ud800", "id", "k" * 300)) | st.text(max_size=5)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def edited(draw: st.DrawFn, valid: Any, values: st.SearchStrategy = VALUES, most: int = 3) -> Any:
    """A JSON value with up to `most` of its values replaced, removed, copied from elsewhere in it, or added."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        there = list(places(data))
        if not there:
            return draw(values)
        *way, last = draw(st.sampled_from(there))
        holder = data
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(("set", "set", "remove", "copy", "add"))):
            case "set":
                holder[last] = draw(values)
            case "remove":
                del holder[last]
            case "copy":
                other: Any = data
                for key in draw(st.sampled_from(there)):
                    other = other[key]
                holder[last] = copy.deepcopy(other)
            case "add" if isinstance(holder, dict):
                holder[draw(KEYS)] = draw(values)
            case _:
                holder.insert(last, draw(values))
    return data


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


@st.composite
def broken(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes with one to four parts cut off, flipped, overwritten, left out, repeated or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from((1, 1, 2, 8, 200))))
        match draw(st.sampled_from(("flip", "cut", "over", "out", "again", "in"))):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "over":
                data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
            case "out":
                del data[at:end]
            case "again":
                data[at:at] = data[at:end]
            case _:
                data[at:at] = draw(st.sampled_from(SNIPPETS) | st.binary(max_size=8))
    return bytes(data)


SNIPPETS = (
    *(b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b"\xe2\x80\xae", b"\xe2\x80\xa8"),
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000),
)


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: valid, with fields changed, with bytes changed, another value, or anything."""
    whole = as_json(valid)
    return st.one_of(
        edited(valid).map(as_json),
        edited(valid).map(as_json),
        broken(whole),
        VALUES.map(as_json),
        st.binary(max_size=40),
    )
