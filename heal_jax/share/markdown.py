"""Markdown for the Hugging Face hub: front matter, text and code that come from elsewhere and stay text and code."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from heal_jax.report.terminal import clean


def escape(value: object) -> str:
    """Text on one line that CommonMark, its tables, and HTML show as it is."""
    text = " ".join(clean(" ".join(str(value).split())).split())
    return re.sub(r"([\\`*_{}\[\]()#!|<>~&$@^])", r"\\\1", text)


def code(text: str, language: str = "") -> str:
    """A fenced block, by a fence that is longer than any in the text."""
    runs = re.findall("`+", text)
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def front_matter(data: Mapping[str, Any]) -> str:
    """YAML between the lines that the hub reads; empty values are left out."""
    given = {name: value for name, value in data.items() if value not in (None, "", [], {})}
    # ASCII, so that characters that a YAML reader may take for the end of a line are written out.
    return f"---\n{yaml.safe_dump(given, sort_keys=False, width=10**6)}---\n\n"


def read_front_matter(text: str) -> dict[str, Any]:
    """The front matter of a card that may be anybody's; empty where there is none that can be read."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
