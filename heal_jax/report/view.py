"""A rollout as a person reads it: its steps, the text and entropy of each token, the hint, what PURE scored."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from heal_jax.config import Config
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.problems.answers import answer_span
from heal_jax.report.data import RunData
from heal_jax.rollout.thinking import thinking_part

END = "⟨end⟩"  # stands for the EOS, which has an entropy but no text


class Token(NamedTuple):
    """entropy (nats) is None where the teacher did not decode it in this rollout, or token texts are not known."""

    text: str
    entropy: float | None


@dataclasses.dataclass(frozen=True)
class Scored:
    """One step as PURE saw it; ratio = ppl / (expected + epsilon)."""

    ppl: float
    expected: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Step:
    """texts, entropies: of its tokens. entropy: their mean, None for kept steps. kept: copied from the parent.
    scored: as PURE saw it.
    """

    number: int
    texts: Sequence[str]
    entropies: Sequence[float | None]
    entropy: float | None
    kept: bool
    scored: Scored | None = None

    @property
    def tokens(self) -> list[Token]:
        return [Token(text, entropy) for text, entropy in zip(self.texts, self.entropies)]


@dataclasses.dataclass(frozen=True)
class View:
    """answer: the figures of the answer, PURE's last step. hint: what the teacher saw and the student will not.

    texts, entropies: of all tokens; where the texts of single tokens are not known, of the steps, without entropies.
    after: the first of them that follow a thinking part and are of no step.
    """

    row: dict[str, Any]
    question: str
    steps: tuple[Step, ...]
    answer: Scored | None
    hint: str
    shaded: bool  # whether the text of each token is known
    texts: Sequence[str]
    entropies: Sequence[float | None]
    after: int

    @property
    def kept_steps(self) -> int:
        return sum(step.kept for step in self.steps)


def view(run: RunData, row: dict[str, Any]) -> View:
    """Put the columns of a rollout together."""
    kept = row["kept_tokens"] or 0
    recorded = _entropies(row)
    found = _texts(row, run.tokenizer)
    starts = row["step_starts"] or [0]
    last = len(row["tokens"]) if found is None else max(starts[-1], _thinking_end(row, found, run.settings))
    bounds = list(zip(starts, [*starts[1:], last]))
    if found is not None:
        # The opening of a thinking part is of no step: it is shown before the first.
        places = [(start if i else 0, end) for i, (start, end) in enumerate(bounds)]
        texts, entropies, after = found, recorded, last
    else:
        texts = _plain_steps(row["text"] or "", len(starts))
        places = [(i, i + 1) for i in range(len(bounds))]
        entropies, after = [None] * len(texts), len(texts)
    parts = ["".join(texts[start:end]) for start, end in places]
    figures, answer = _scores(row, parts, kept, run.settings)
    steps = tuple(
        Step(
            number=i,
            texts=texts[first:behind],
            entropies=entropies[first:behind],
            entropy=_mean(recorded[start:end]),
            kept=start < kept,
            scored=figures.get(i),
        )
        for i, ((start, end), (first, behind)) in enumerate(zip(bounds, places))
    )
    shaded = found is not None
    return View(row, run.question(row), steps, answer, _hint(run, row, shaded), shaded, texts, entropies, after)


def _thinking_end(row: dict[str, Any], texts: Sequence[str], config: Config) -> int:
    """Tokens up to where the thinking part ends; all where the config knows none."""
    if not config.grade.think_end:
        return len(texts)
    spans, start = [], 0
    for text in texts:
        text = "" if text == END else text
        spans.append((text, start))
        start += len(text)
    return thinking_part(spans, len(row["tokens"]), config.grade)[1] or len(texts)


def _texts(row: dict[str, Any], tokenizer: Tokenizer | None) -> list[str] | None:
    """The text of each token; None where they are not known: the folder may hold another tokenizer by now."""
    try:
        texts = [text for text, _ in tokenizer.spans(row["tokens"])] if tokenizer else []
    except IndexError:
        return None
    if tokenizer is None or "".join(texts) != row["text"]:
        return None
    return texts + [END] * (len(row["tokens"]) - len(texts))


def _entropies(row: dict[str, Any]) -> list[float | None]:
    """One for each of `tokens`: a repair has recorded none for its kept prefix."""
    return [None] * (len(row["tokens"]) - len(row["entropy"])) + row["entropy"]


def _plain_steps(text: str, count: int) -> list[str]:
    """Steps of a text without its tokens; all of it in the first where splitting it finds another number of steps."""
    parts: list[str] = []
    for part in re.findall(r".+?(?:\n{2,}|\Z)", text, re.DOTALL):
        if parts and (not part.strip() or not parts[0].strip()):
            parts[-1] += part
        else:
            parts.append(part)
    return parts if len(parts) == count else [text]


def _hint(run: RunData, row: dict[str, Any], decodable: bool) -> str:
    """What the teacher's context held beyond prompt and kept prefix; all of it where it does not begin with these."""
    context = row["context_tokens"] or []
    known = [*row["prompt_tokens"], *row["tokens"][: row["kept_tokens"] or 0]]
    if context == known:
        return ""
    if run.tokenizer is None or not decodable:  # what the config says that it was
        template = run.settings.gear.hint if row["kind"] == "repair" else run.settings.hindsight.prompt
        answer = run.problems.get(row["problem_id"], {}).get("answer") or "?"
        return template.replace("{answer}", answer).replace("{question}", run.question(row))
    rest = context[len(known) :] if context[: len(known)] == known else context
    try:
        return run.tokenizer.text(rest)
    except IndexError:
        return ""


def _scores(
    row: dict[str, Any], texts: Sequence[str], kept: int, config: Config
) -> tuple[dict[int, Scored], Scored | None]:
    """PURE's figures by text step, and the answer's.

    Steps from the cut on are scored in order. The answer is one more, the last, and a step that holds nothing else
    vanishes: so there are as many figures as steps although one of them is the answer's.
    """
    if row["step_ppl"] is None or row["step_expected_ppl"] is None:
        return {}, None
    epsilon = config.pure.epsilon
    figures = [Scored(p, e, p / (e + epsilon)) for p, e in zip(row["step_ppl"], row["step_expected_ppl"], strict=True)]
    numbers = [i for i, start in enumerate(row["step_starts"]) if start >= kept]
    grade = config.grade
    span = answer_span(row["text"] or "", grade.answer_open, grade.answer_close, grade.think_end)
    answer = figures.pop() if figures and span is not None else None
    if answer is not None and span is not None and len(figures) < len(numbers):
        ends = [sum(map(len, texts[: i + 1])) for i in range(len(texts))]
        holder = next((i for i, end in enumerate(ends) if span[0] < end), None)
        numbers = [i for i in numbers if i != holder]
    return dict(zip(numbers, figures, strict=False)), answer


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
