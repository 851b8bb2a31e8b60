"""Is an answer right? The code of the grading process: imports stay light, and nothing here is trusted to end.

Each scorer maps (problem, answer) to a grade (correct, wrong, unparsable) and a reason. An exception is unparsable.
"""

import functools
import json
import logging
import os
import pickle
import re
import resource
import signal
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Verdict = tuple[str, str]
Score = Callable[[dict[str, Any], str], Verdict]

MEMORY = 4 << 30  # bytes of address space: an answer such as 10^{10^{10}} must not take the machine with it


def serve(connection: Connection) -> None:
    """Score what comes over the connection until it closes.

    A request is (timeout in seconds, [(scorer, {question, answer, metadata}, [answers])]); for each answer, in order,
    the reply is JSON [grade, reason]; ["broken", reason] where a scorer cannot be loaded. The kernel ends the process
    (SIGPROF) when one answer has used `timeout` seconds of processor time, also inside C code that never returns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable()
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    fence = _Fence()
    connection.send_bytes(b"ready")
    while True:
        try:
            timeout, groups = connection.recv()
        except EOFError:
            return
        for kind, problem, answers in groups:
            try:
                score = load(kind, problem["metadata"])
            except Exception as error:
                connection.send_bytes(json.dumps(("broken", f"{kind}: {_reason(error)}")).encode())
                return
            for answer in answers:
                signal.setitimer(signal.ITIMER_PROF, max(timeout, 0.001))
                fence.up = True
                try:
                    verdict = score(problem, answer)
                except BaseException as error:  # math-verify has exceptions outside of Exception
                    verdict = ("unparsable", _reason(error))
                fence.up = False
                signal.setitimer(signal.ITIMER_PROF, 0)
                connection.send_bytes(json.dumps(verdict).encode())


class _Fence:
    """Keeps an answer from doing harm where a family's scorer evaluates it as Python. A fence, not a sandbox."""

    def __init__(self) -> None:
        self.up = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.up:
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        reaches_out = event.startswith(("os.", "shutil.", "socket.", "subprocess.", "ctypes.", "pty."))
        if writes or (reaches_out and event not in ("os.listdir", "os.scandir")):  # imports list folders
            raise PermissionError(f"an answer may not do {event}")


def load(kind: str, metadata: dict[str, Any]) -> Score:
    """The scorer of a kind, imported and warmed up, so that no answer pays for that."""
    if kind == "reasoning_gym":
        family, options = metadata["source_dataset"], metadata.get("source_options", {})
        return _family(family, pickle.dumps(options))
    if kind == "math":
        _warm_up()
        return math
    if kind == "reference":
        _warm_up()
        return reference
    if kind == "exact":
        return exact
    if kind == "choice":
        return choice
    raise ValueError(f"no scorer of this name: {kind}")


def exact(problem: dict[str, Any], answer: str) -> Verdict:
    """The same text, white space and Unicode composition aside."""
    return "correct" if _same_text(problem["answer"], answer) else "wrong", ""


# A lead such as "The answer is", the letter (in brackets, or before a mark that sets it apart), the option's text.
LEAD = r"(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)\s*(?:is|=)?\s*:?\s*"
CHOICE = re.compile(
    rf"(?:{LEAD}){{0,2}}(?:(?:\(\s*([a-z])\s*\)|\[\s*([a-z])\s*\])|([a-z])(?=$|[).:\]]))[).:\]\s]*(.*)", re.IGNORECASE
)
SECOND = re.compile(  # another letter in the option's text: bracketed, alone, or after a word or mark that joins
    r"(?:^|\s)[(\[]\s*[A-Za-z]\s*[)\]]|^\W*[A-Z]\W*$|(?:^|\s)[A-Z][):](?:\s|$)|^[A-Z]\.\s"
    r"|(?:\b(?:[Oo]r|[Nn]or|[Nn]ot)\b)\W*[A-Z]\b|(?:\b(?:[Aa]nd|[Bb]ut|[Nn]o)\b|[,;/&])\W*[A-Z]\b(?!\s+[a-z])"
)
TAKEN_BACK = re.compile(r"(?:is|was|seems)\s+(?:not\b|wrong|incorrect|false)", re.IGNORECASE)


def choice(problem: dict[str, Any], answer: str) -> Verdict:
    """The reference's letter and no other: B, b, (B), [B], B., B) 42, (B) 42, Answer: B, The answer is (B).

    Strict: what names two letters (A or B; A, B; B. No, C), takes one back (not B) or says more without a mark after
    the letter (B because) is wrong. The option's text is not compared.
    """
    letter = choice_letter(answer)
    if letter is None:
        return "wrong", "not one choice letter"
    return "correct" if letter == choice_letter(problem["answer"]) else "wrong", ""


def choice_letter(text: str) -> str | None:
    """The one letter that a multiple-choice answer names, as a capital; None where it is not one."""
    match = CHOICE.fullmatch(_text(WRAPPER.sub(r"\1", text).replace("$", "").replace("*", "")))
    if match is None or SECOND.search(match[4]) or TAKEN_BACK.match(match[4]):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _same_text(gold: str, answer: str) -> bool:
    return _text(gold) == _text(answer)


def _same_numbers(gold: str, answer: str) -> bool:
    return Counter(re.findall(r"\d+", gold)) == Counter(re.findall(r"\d+", answer))


def _one_number(gold: str, answer: str) -> bool:
    match = re.fullmatch(r"(?:\\?\$|[£€])?\s*(-?\d+(?:\.\d+)?)\s*(?:[^\W\d_]+\s*)*\.?", answer.strip())
    return match is not None and float(match[1]) == float(gold)


# What must hold besides full credit, in families whose scorer gives that to wrong answers.
STRICTER: dict[str, Callable[[str, str], bool]] = {
    "coin_flip": _same_text,  # a prefix is enough: "0" for 0.25
    "game_of_life_halting": _same_text,  # any text is enough
    "gsm_symbolic": _one_number,  # the first number without its sign is enough: "5 or 7", "-5", "5%" for 5
    "puzzle24": _same_numbers,  # any four numbers that make 24 are enough
}


@functools.cache
def _family(name: str, options: bytes) -> Score:
    import reasoning_gym

    data = reasoning_gym.create_dataset(name, **pickle.loads(options))
    also = STRICTER.get(name)

    def score(problem: dict[str, Any], answer: str) -> Verdict:
        credit = data.score_answer(answer, problem)
        if credit == 1.0:
            return "correct" if also is None or also(problem["answer"], answer) else "wrong", ""
        return "wrong", f"partial credit {credit:.3g}" if credit else ""

    return score


# Mathematics: math-verify compares, and what follows keeps it strict.

WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[^\W\d_]+(?:[\s,;'-]+[^\W\d_]+)*")
LONG_WORD = re.compile(r"[^\W\d_]{4,}")
INTEGER = re.compile(r"[+-]?\d{1,1000}")
PERCENT = re.compile(r"\s*(?:\\?%|percent|pct|\\(?:text|mathrm)\s*\{\s*(?:\\?%|percent)\s*\})$", re.IGNORECASE)
SPACED_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?)[eE]([+-]?\d+)(?!\w)")
BASE = re.compile(r"\d_\{?\s*(\w+)\s*\}*$")


def math(problem: dict[str, Any], answer: str) -> Verdict:
    """Equal as mathematics, by math-verify, with these rules of our own:

    * a percent sign is part of the value: 9% is 0.09, never 9;
    * several parts: each is there, as often as in the reference, and in its order where the reference names them
      (x = 1, y = 2) and the answer does not;
    * words are compared as words, not as products of letters; digits in two stated bases are not equal;
    * numbers agree to five digits, however small they are;
    * a reference that is not an expression is compared as text.

    Units are not compared (5 cm is 5 and 5 m).
    """
    gold = problem["answer"]
    if _same_text(gold, answer):
        return "correct", ""
    word, other = _plain(gold), _plain(answer)
    if WORDS.fullmatch(word) and LONG_WORD.search(word):
        return ("correct" if word == other else "wrong"), ""
    if INTEGER.fullmatch(word) and INTEGER.fullmatch(other):
        return ("correct" if int(word) == int(other) else "wrong"), ""
    expected = _reference(gold)
    if expected is None:
        return "wrong", "the reference answer is not an expression and was compared as text"
    found = _parse(answer)
    if found is None:
        return "unparsable", "math-verify cannot read the answer"
    bases = {match[1] for match in (BASE.search(word), BASE.search(other)) if match}
    return ("correct" if len(bases) < 2 and _equal(expected, found) else "wrong"), ""


NOTATION = re.compile(r"[\\^_{}*]|\d\s*/\s*\d")


def plain_text(answer: str) -> bool:
    """Whether an answer is words, a choice or a plain number, with nothing in it that is mathematical notation.

    Such a reference needs no parser: `math` compares it as a number or as text.
    """
    plain = _plain(answer)
    return not NOTATION.search(plain) and not any(unicodedata.category(letter) == "Sm" for letter in plain)


def reference(problem: dict[str, Any], answer: str) -> Verdict:
    """Whether `math` can compare with a reference answer: math-verify reads it, and a comparison comes to an end."""
    expected = _reference(answer)
    if expected is None:
        return "unparsable", "math-verify cannot read it"
    with suppress(Exception):  # what cannot be compared with a number may be comparable with its like
        _equal(expected, _parse("1"))
    return "correct", ""


def _text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _plain(text: str) -> str:
    """Without dollar signs, font commands, the full stop and case."""
    return _text(WRAPPER.sub(r"\1", text).replace("\\$", "").replace("$", "")).removesuffix(".").casefold()


@functools.lru_cache(maxsize=1024)
def _reference(gold: str) -> Any:
    import sympy

    try:
        value = _parse(gold)
    except Exception:
        return None
    return None if value in (sympy.nan, sympy.zoo) else value


def _parse(text: str) -> Any:
    """A sympy object, or None where the whole text is not one expression."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as read
    from sympy import Basic, Expr, MatrixBase, Rational

    text = _text(text).replace("\\$", "").replace("$", "").replace("−", "-").strip().removesuffix(".")
    whole = PERCENT.sub("", text)
    share = whole != text
    whole = re.sub(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})", "", whole)
    if SPACED_THOUSANDS.fullmatch(whole):
        whole = whole.replace(" ", "")
    whole = SCIENTIFIC.sub(r"\1\\times 10^{\2}", whole)
    depth = 0
    for brace in re.findall(r"\\.|[{}]", whole):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return None
    if depth or re.search(r"\d\s+\d", whole):  # math-verify would add the two numbers
        return None
    values = read(
        f"\\boxed{{{whole}}}",
        [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)],
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )
    value = values[0] if values and isinstance(values[0], Basic | MatrixBase) else None
    if share:
        return value * Rational(1, 100) if isinstance(value, Expr) else None
    return value


def _equal(expected: Any, found: Any) -> bool:
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Eq

    parts = list(expected._unsorted_args) if isinstance(expected, FiniteSet) else []
    given = _parts(found)
    if len(set(parts)) < len(parts):
        return Counter(parts) == Counter(given)
    names = {part.lhs for part in parts if isinstance(part, Eq)}
    if len(names) > 1 and len(names) == len(parts) and not any(isinstance(part, Eq) for part in given):
        return len(parts) == len(given) and all(map(_verify, (part.rhs for part in parts), given))
    return _verify(expected, found)


def _parts(value: Any) -> list[Any]:
    """What a list, a tuple or a pair (which is read as an open interval) holds, in the order written."""
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Interval, Tuple

    if isinstance(value, FiniteSet):
        return list(value._unsorted_args)
    if isinstance(value, Tuple):
        return list(value.args)
    if isinstance(value, Interval) and value.is_open:
        return [value.start, value.end]
    return [value]


def _verify(expected: Any, found: Any) -> bool:
    from math_verify import verify
    from sympy import Eq, Expr

    if not verify(expected, found, timeout_seconds=None, raise_on_error=True):
        return False
    a, b = (value.rhs if isinstance(value, Eq) else value for value in (expected, found))
    if a == b or not all(isinstance(value, Expr) and value.is_number for value in (a, b)):
        return True
    # It rounds to six decimals and drops what is below its precision, so that any two tiny numbers are equal.
    a, b = a.evalf(20), b.evalf(20)
    return bool(abs(a - b) <= 1e-5 * max(abs(a), abs(b)) + 1e-100)


@functools.cache
def _warm_up() -> None:
    """Import and build the parser's tables."""
    _verify(_parse("\\frac{x}{2}+1"), _parse("(x+2)/2"))


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
