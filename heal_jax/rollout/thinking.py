"""The thinking part of a rollout: steps, breakpoint and hint lie in it, the answer after it (DESIGN section 2)."""

from collections.abc import Sequence

import numpy as np

from heal_jax.config import GradeSpec
from heal_jax.model.lm import LanguageModel
from heal_jax.model.tokenizer import WHITE_SPACE, Tokenizer
from heal_jax.rollout.generate import split_steps


def thinking_steps(
    lm: LanguageModel, rollouts: Sequence[Sequence[int]], width: int, spec: GradeSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`split_steps` of the thinking parts of rollouts; tokens outside them are of no step (-1)."""
    if not spec.think_end:
        return split_steps(lm, rollouts, width)
    parts = [thinking_part(lm.tokenizer.spans(list(tokens)), len(tokens), spec) for tokens in rollouts]
    inside = [tokens[first:last] for tokens, (first, last) in zip(rollouts, parts)]
    index, starts, count = split_steps(lm, inside, width)
    for i, (first, _) in enumerate(parts):
        index[i], starts[i] = np.roll(index[i], first), np.roll(starts[i], first)  # what comes round is padding
    return index, starts, count


def opening(tokenizer: Tokenizer, tokens: Sequence[int], spec: GradeSpec) -> tuple[int, ...]:
    """What a repair that keeps no step puts before the hint: nothing, or, where models open their thinking part
    themselves, the tag that does so, as the failed rollout wrote it or, where it did not, in the teacher's encoding.
    """
    if not spec.think_open:
        return ()
    first, _ = thinking_part(tokenizer.spans(list(tokens)), len(tokens), spec)
    return tuple(tokens[:first]) or tuple(tokenizer.encode(spec.think_open))


def thinking_part(spans: Sequence[tuple[str, int]], length: int, spec: GradeSpec) -> tuple[int, int]:
    """First and last + 1 token of the thinking part; all tokens where `spec.think_end` is not set.

    spans: text and its start of each token, the EOS left out (`Tokenizer.spans`); length: tokens, the EOS included. The
    part ends before the first `think_end`; a token that holds the beginning of that tag is in it where it says
    something else before the tag. A part that is never closed goes to the end.

    With `think_open` the part begins after that tag and the white space that follows it: these tokens are of no step,
    for they say nothing, and a repair that keeps them alone is scored from its first word on. A tag that shares a token
    with the first word is text of the first step. A rollout that neither opens nor closes has no thinking part.
    """
    if not spec.think_end:
        return 0, length
    text = "".join(piece for piece, _ in spans)
    after = _after_tag(text, spec.think_open.strip(WHITE_SPACE))
    at = text.find(spec.think_end, after)
    if at < 0 and after == 0 and spec.think_open:
        return 0, 0
    first = _opening(spans, text, spec.think_open.strip(WHITE_SPACE), after)
    last = length
    if at >= 0:
        last = sum(start < at for _, start in spans)
        piece, start = spans[last - 1] if last else ("", 0)
        if start + len(piece) > at and not text[start:at].strip(WHITE_SPACE):
            last -= 1
    return first, max(first, last)


def _after_tag(text: str, tag: str) -> int:
    """Where what follows an opening tag begins; 0 where the text does not begin with one."""
    start = len(text) - len(text.lstrip(WHITE_SPACE))
    return start + len(tag) if tag and text.startswith(tag, start) else 0


def _opening(spans: Sequence[tuple[str, int]], text: str, tag: str, after: int) -> int:
    """Number of first tokens that hold the tag, which ends at `after`, and white space alone; 0 where none do."""
    if not after:
        return 0
    content = len(text) - len(text[after:].lstrip(WHITE_SPACE))
    # A token without text begins a character that a later one completes: it is content.
    whole = [i + 1 for i, (piece, start) in enumerate(spans) if piece and start + len(piece) <= content]
    return whole[-1] if whole and sum(len(piece) for piece, _ in spans[: whole[-1]]) >= after else 0
