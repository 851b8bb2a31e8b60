"""Where a text's answer stands."""

import re
from collections.abc import Sequence

from heal_jax.config import GradeSpec


def answer_span(text: str, opening: str, closing: str, think_end: str = "") -> tuple[int, int] | None:
    """Characters [start, end) between the last `opening` and its matching `closing`; None where there is no such span.

    Where the last opening is never closed there is no answer: an earlier one was given up by whoever wrote the last.
    With an opening that ends in "{" and the closing "}" braces are counted, those escaped by a backslash left out;
    otherwise the next `closing` counts. With `think_end` set, only what follows its last occurrence is looked at.
    """
    start = 0
    if think_end:
        found = text.rfind(think_end)
        if found < 0:
            return None
        start = found + len(think_end)
    opened = _last_unpaired(text, opening, closing, start) if opening in closing else text.rfind(opening, start)
    if opened < 0:
        return None
    begin = opened + len(opening)
    braces = opening.endswith("{") and closing == "}"
    end = _closing_brace(text, begin) if braces else text.find(closing, begin)
    return None if end < 0 else (begin, end)


def answer_tokens(
    spans: Sequence[tuple[str, int]], opening: str, closing: str, think_end: str = ""
) -> tuple[int, int] | None:
    """First and last + 1 of the tokens that overlap the answer of their text; None where there is none.

    spans: text and its start of each token (`Tokenizer.spans`); the others as in `answer_span`.
    """
    found = answer_span("".join(text for text, _ in spans), opening, closing, think_end)
    if found is None:
        return None
    hit = [i for i, (text, start) in enumerate(spans) if start < found[1] and start + len(text) > found[0]]
    return (hit[0], hit[-1] + 1) if hit else None


def extract(text: str, spec: GradeSpec) -> str | None:
    """The answer of a text without surrounding white space; None where there is none."""
    span = answer_span(text, spec.answer_open, spec.answer_close, spec.think_end)
    return None if span is None else text[span[0] : span[1]].strip()


def _closing_brace(text: str, begin: int) -> int:
    """Index of the brace that closes the one before `begin`, or -1."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def _last_unpaired(text: str, opening: str, closing: str, start: int) -> int:
    """Index of the last opening that is not part of a closing (such as "$$ ... $$"), or -1: pairs are read in order."""
    last = -1
    while (found := text.find(opening, start)) >= 0:
        last = found
        closed = text.find(closing, found + len(opening))
        if closed < 0:
            break
        start = closed + len(closing)
    return last
