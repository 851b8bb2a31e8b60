"""A table's values as the text of a problem, and text cut short for messages."""

import difflib
import json
import numbers
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from heal_jax.errors import InputError

MAX_MAGNITUDE = 50  # digits before or after the point of a number that is written out


def field_text(row: Mapping[str, Any], column: str, number: bool = False, empty: bool = False) -> str:
    """A field's text without surrounding white space; numbers are written out where they are allowed.

    Bytes are read as UTF-8. A decimal keeps its digits (1.50), a binary float that is whole loses its point (3.0 is 3,
    as tables write whole numbers in a column with gaps). Raises InputError.
    """
    if column not in row:
        there = ", ".join(map(repr, row)) or "nothing"
        raise InputError(f"no {column!r} (there is: {there}); problems.fields says which field is which")
    value = row[column]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{column!r} is not UTF-8 at byte {error.start + 1}") from None
    if number and (written := _written(value, column)) is not None:
        value = written
    if not isinstance(value, str):
        kind = "text or a number" if number else "text"
        raise InputError(f"{column!r} is {short(json.dumps(value, default=str))}; {kind} is expected")
    if not value.strip() and not empty:
        raise InputError(f"{column!r} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{column!r} holds half a surrogate pair, which is not text")
    return value.strip()


def _written(value: Any, column: str) -> str | None:
    """A number's decimal notation; None for what is no finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real) and not isinstance(value, Decimal):  # float, NumPy's floats: shortest digits
        value = Decimal(int(float(value)) if float(value).is_integer() else str(value))
    if not isinstance(value, Decimal) or not value.is_finite():
        return None
    if abs(value.adjusted()) > MAX_MAGNITUDE:
        raise InputError(f"{column!r} is a number too long to be written out; give it as text")
    return format(value, "f")


def short(text: str, length: int = 80) -> str:
    """On one line, cut to a length."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def near(name: str, allowed: Any) -> str:
    """ ", did you mean ...?", or what there is where that is little."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    if close:
        return f", did you mean {close[0]!r}?"
    return f", there are: {', '.join(allowed)}" if 0 < len(allowed) <= 20 else ""
