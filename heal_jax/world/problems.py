"""Problems of the built-in world: sums of three long numbers from reasoning-gym's `chain_sum`.

The generator's problems are kept as they are; this module sorts them by what their columns ask for:

* easy: no column receives a carry of two, at most one receives a carry of one next to a nine;
* medium: no carry of two, at least three columns receive a carry of one next to a nine;
* hard: at least four columns receive a carry of two.

What lies between (one to three carries of two, or two nines) has no level and is not used. The split of a problem is
a hash of its question, so the four splits are disjoint whatever the seeds.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator

import reasoning_gym

LEVELS = ("easy", "medium", "hard")
SPLITS = {"pretrain": range(0, 160), "train": range(160, 208), "dev": range(208, 224), "test": range(224, 256)}
FAMILY = "chain_sum"
TERMS, MIN_DIGITS, MAX_DIGITS = 3, 11, 12
SCAN_SEED = 20_260_000  # first seed of the generator; a problem set's own seed moves it by SCAN_STRIDE
SCAN_STRIDE = 10_000_000


def question_of(terms: list[int]) -> str:
    """The generator's wording, for problems that are made here (pretraining)."""
    return f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="


def terms_of(question: str) -> list[int] | None:
    """The summands of a question, or None where it is not a plain sum."""
    expression = question.rsplit(":", 1)[-1].strip().removesuffix("=").strip()
    if not re.fullmatch(r"[0-9]+( \+ [0-9]+)+", expression):
        return None
    return [int(term) for term in expression.split(" + ")]


def split_of(question: str) -> str:
    """pretrain, train, dev or test, by the first byte of the question's SHA-256."""
    bucket = hashlib.sha256(question.encode()).digest()[0]
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def columns(terms: list[int]) -> list[tuple[list[int], int]]:
    """For each column, units first: its digits (one a term) and the carry it receives."""
    carry, out = 0, []
    for place in range(len(str(max(terms)))):
        digits = [term // 10**place % 10 for term in terms]
        out.append((digits, carry))
        carry = (sum(digits) + carry) // 10
    return out


def nine_meets_one(digits: list[int], carry: int) -> bool:
    """The medium sub-skill: a carry of one into a column that holds a nine."""
    return carry == 1 and 9 in digits


def level_of(terms: list[int]) -> str | None:
    """easy, medium, hard, or None for what lies between."""
    cells = columns(terms)
    twos = sum(carry == 2 for _, carry in cells)
    nines = sum(nine_meets_one(digits, carry) for digits, carry in cells)
    if twos:
        return "hard" if twos >= 4 else None
    if nines >= 3:
        return "medium"
    return "easy" if nines <= 1 else None


def scan(split: str, seed: int) -> Iterator[tuple[int, str, str, str]]:
    """Endless (index, level, question, answer) of one split, in the generator's order."""
    size = SCAN_STRIDE
    data = reasoning_gym.create_dataset(
        FAMILY,
        size=size,
        seed=SCAN_SEED + seed * SCAN_STRIDE,
        min_terms=TERMS,
        max_terms=TERMS,
        min_digits=MIN_DIGITS,
        max_digits=MAX_DIGITS,
    )
    for index in range(size):
        entry = data[index]
        terms = terms_of(entry["question"])
        if terms is None or split_of(entry["question"]) != split:
            continue
        level = level_of(terms)
        if level is not None:
            yield index, level, entry["question"], entry["answer"]


def take(split: str, counts: dict[str, int], seed: int) -> list[tuple[int, str, str, str]]:
    """The first counts[level] problems of each level: (index, level, question, answer), by index."""
    left = dict(counts)
    out = []
    for item in scan(split, seed):
        if not any(left.values()):
            break
        if left.get(item[1], 0):
            left[item[1]] -= 1
            out.append(item)
    return out


def json_lines(split: str, count: int) -> str:
    """The first `count` problems of each level, as a `jsonl:` source or another tool reads them."""
    taken = take(split, dict.fromkeys(LEVELS, count), seed=0)
    rows = [
        {"id": f"sums-{split}-0-{index}", "level": level, "question": question, "answer": answer}
        for index, level, question, answer in taken
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(json_lines(sys.argv[1], int(sys.argv[2])))
