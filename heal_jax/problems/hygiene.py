"""Which training problems are left out: repeats, near-repeats, and what evaluation asks, too.

Questions are compared as words: runs of letters, numbers, and signs that calculate; case and punctuation do not count.

*The source's own wording.* Templates and competitions repeat phrases ("State the final answer to the following
arithmetic problem"), which say nothing about who copied whom. Sequences of four words (fewer where `hygiene.ngram` is)
that at least a hundredth, and at least five, of the different questions of a source (or of all) hold are wording. The
words they cover are taken out before n-grams and near-duplicates are looked for, and what is left is read on over the
gap. A question with too few words left for an n-gram or a shingle is compared as a whole alone.

*Generators.* Problems of one world: or rg: source differ in what is asked, and what they share is how the generator
words it: among themselves only the same question counts.

The order of problems decides who stays, and nothing else: no randomness, no hash seeds.
"""

import itertools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heal_jax.config import HygieneSpec
from heal_jax.errors import InputError
from heal_jax.problems.sources import Problem

FILE = "removed.jsonl"  # in the run directory

WORDING = 4  # words: short enough for short templates; of ordinary phrases few reach SHARE
SHARE = 0.01  # of a source's different questions: far more than copies of one problem, less than most templates have
LEAST = 5  # different questions: fewer that agree may as well be copies
SHINGLE = 3  # words

WORD = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>%!×÷·√±−≤≥≠∑∏∫]")
REASONS = {  # of `Removed`, and what the summary calls their number
    "duplicate": "duplicates",
    "conflict": "conflicts",
    "near-duplicate": "near_duplicates",
    "held out": "held_out",
    "n-gram": "ngrams",
}

Words = tuple[str, ...]


@dataclass(frozen=True)
class Removed:
    """A training problem that was left out, and the problem that it was left out for."""

    id: str
    place: str
    reason: str
    """duplicate (the same question and answer), conflict (the same question, another answer), near-duplicate; held out
    (the same question as a held-out problem), n-gram (words in a row shared with one)."""
    other_id: str
    other_place: str
    question: str
    ngram: str | None = None
    """n-gram: the words."""
    similarity: float | None = None
    """near-duplicate: Jaccard similarity of the three-word sequences, wording aside."""


def clean(
    train: Sequence[Problem], held_out: Sequence[Problem], spec: HygieneSpec
) -> tuple[list[Problem], list[Removed]]:
    """The training problems that stay, in order, and those that do not, reason by reason.

    Held-out problems are taken as they are: their accuracies are to be comparable. Raises InputError where nothing
    stays.
    """
    left, removed = list(train), []

    def leave_out(found: list[Removed]) -> None:
        gone = {r.id for r in found}
        left[:] = [p for p in left if p.id not in gone]
        removed.extend(found)

    leave_out(_repeats(left))
    if spec.near or spec.ngram:
        content = _content([*left, *held_out], min(WORDING, spec.ngram or WORDING))
        if spec.near:
            leave_out(_near_repeats(left, content, spec.near))
    leave_out(_asked(left, held_out))
    if spec.ngram:
        leave_out(_overlaps(left, held_out, content, spec.ngram))
    if train and not left:
        first = removed[0]
        raise InputError(
            f"no training problem is left: {described(counts(train, removed))}; {first.place} goes for "
            f"{first.other_place} ({first.reason}); take another split, seed or file for training or evaluation; "
            "hygiene.near and hygiene.ngram say what counts as alike"
        )
    return left, removed


def counts(train: Sequence[Problem], removed: Sequence[Removed]) -> dict[str, int]:
    """Figures for the summary: problems loaded, left out for each reason, and kept."""
    reasons = Counter(r.reason for r in removed)
    return {
        "loaded": len(train),
        **{name: reasons[reason] for reason, name in REASONS.items()},
        "kept": len(train) - len(removed),
    }


def described(figures: dict[str, int]) -> str:
    """The figures in a line."""
    reasons = ", ".join(f"{figures[name]} {name.replace('_', ' ')}" for name in REASONS.values() if figures[name])
    return f"{figures['loaded'] - figures['kept']} of {figures['loaded']} training problems are left out ({reasons})"


def to_json_lines(removed: Sequence[Removed]) -> str:
    return "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in removed)


def normal(text: str) -> str:
    """Without differences of case, white space and Unicode composition. (Not of compatibility: x² is not x2.)"""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words(text: str) -> Words:
    return tuple(WORD.findall(normal(text)))


def grams(sequence: Words, size: int) -> Iterator[Words]:
    """Every `size` neighbours."""
    return zip(*(itertools.islice(sequence, start, None) for start in range(size)))


def _removed(problem: Problem, reason: str, other: Problem, **found: Any) -> Removed:
    place, other_place = (p.place or p.id for p in (problem, other))
    return Removed(problem.id, place, reason, other.id, other_place, problem.question, **found)


def _repeats(problems: Sequence[Problem]) -> list[Removed]:
    """Problems whose question came before."""
    out: list[Removed] = []
    seen: dict[str, Problem] = {}
    for p in problems:
        first = seen.setdefault(normal(p.question), p)
        if first is not p:
            out.append(_removed(p, "duplicate" if normal(first.answer) == normal(p.answer) else "conflict", first))
    return out


def _content(problems: Iterable[Problem], size: int) -> dict[str, Words]:
    """The words of each question without the wording of sources: see the module's text."""
    pools: dict[str, dict[str, Words]] = defaultdict(dict)  # different questions of all, and of each source
    for p in problems:
        question = normal(p.question)
        if question not in pools[""]:
            pools[""][question] = words(question)
        pools[p.source][question] = pools[""][question]
    wording: set[Words] = set()
    for pool in pools.values():
        least = max(LEAST, SHARE * len(pool))
        holders = Counter(itertools.chain.from_iterable(map(set, pool.values())))
        common = {word for word, count in holders.items() if count >= least}  # no other is in a common sequence
        held: Counter[Words] = Counter()
        for text in pool.values():
            held.update({gram for gram in grams(text, size) if common.issuperset(gram)})
        wording.update(gram for gram, count in held.items() if count >= least)
    first = {gram[0] for gram in wording}

    def left(text: Words) -> Words:
        covered = bytearray(len(text))
        for start, gram in enumerate(grams(text, size)):
            if gram[0] in first and gram in wording:
                covered[start : start + size] = b"\1" * size
        return tuple(word for word, hidden in zip(text, covered) if not hidden)

    return {question: left(text) for question, text in pools[""].items()}


def _near_repeats(problems: Sequence[Problem], content: dict[str, Words], threshold: float) -> list[Removed]:
    """Problems that are near-duplicates of one that stays.

    Only those with the same answer and the same numbers are compared, as two problems that differ in either are two;
    their shingles must agree with the sources' wording and without it. No pair is missed: two sets of n and m shingles
    with Jaccard similarity t share one of the n - ceil(t n) + 1 rarest of the one and the m - ceil(t m) + 1 rarest of
    the other (Bayardo, Ma, Srikant: Scaling up all pairs similarity search, WWW 2007).
    """

    def similarity(a: set[Words], b: set[Words]) -> float:
        return len(a & b) / len(a | b)

    groups: dict[tuple[str, ...], list[tuple[Problem, set[Words]]]] = defaultdict(list)
    for p in problems:
        shingles = set(grams(content[normal(p.question)], SHINGLE))
        if shingles and not _made(p):
            numbers = sorted(word for word in words(p.question) if word[0].isdigit())
            groups[normal(p.answer), *numbers].append((p, shingles))
    out = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        holders = Counter(itertools.chain.from_iterable(shingles for _, shingles in group))
        index: dict[Words, list[int]] = defaultdict(list)
        for number, (p, shingles) in enumerate(group):
            rare = sorted(shingles, key=lambda shingle: (holders[shingle], shingle))
            prefix = rare[: len(rare) - math.ceil(threshold * len(rare) - 1e-9) + 1]
            for other in sorted({i for shingle in prefix for i in index[shingle]}):
                first, theirs = group[other]
                whole = (set(grams(words(q.question), SHINGLE)) for q in (p, first))
                alike = similarity(shingles, theirs)
                if alike >= threshold and similarity(*whole) >= threshold:
                    out[p.id] = _removed(p, "near-duplicate", first, similarity=round(alike, 4))
                    break
            else:
                for shingle in prefix:
                    index[shingle].append(number)
    return [out[p.id] for p in problems if p.id in out]


def _asked(problems: Sequence[Problem], held_out: Sequence[Problem]) -> list[Removed]:
    """Problems whose question is held out."""
    asked = {normal(p.question): p for p in reversed(held_out)}
    return [_removed(p, "held out", asked[key]) for p in problems if (key := normal(p.question)) in asked]


def _overlaps(
    problems: Sequence[Problem], held_out: Sequence[Problem], content: dict[str, Words], size: int
) -> list[Removed]:
    """Problems that share `size` words in a row with a held-out one; the first such words, and whose they are."""
    asked: dict[Words, dict[str, Problem]] = defaultdict(dict)  # the first problem of each source
    for p in held_out:
        for gram in grams(content[normal(p.question)], size):
            asked[gram].setdefault(p.source, p)
    out = []
    for p in problems:
        for gram in grams(content[normal(p.question)], size):
            others = [other for source, other in asked.get(gram, {}).items() if source != p.source or not _made(p)]
            if others:
                out.append(_removed(p, "n-gram", others[0], ngram=" ".join(gram)))
                break
    return out


def _made(problem: Problem) -> bool:
    """Whether a generator made it."""
    return problem.source.startswith(("world:", "rg:"))
