"""Text from models and files: shown, never obeyed, in a terminal or on the page."""

import unicodedata

from rich.console import Console
from rich.text import Text

MOVES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of what is obeyed or moves what is around it


def clean(text: str) -> str:
    """Text with what a terminal would obey written out: escape as \\x1b, right-to-left marks as \\u202e. Line ends and
    tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in MOVES else _escaped(c) for c in text)


def visible(text: str) -> str:
    """The same on one line: line ends as arrows, tabs written out."""
    return clean(text).replace("\n", "↵").replace("\t", "\\t")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def say(console: Console, text: Text) -> None:
    """A line that the terminal, not we, breaks."""
    console.print(text, soft_wrap=True)
