"""The rollouts of a run as the page's browser reads them: compressed, in parts, inside the page.

The index (problems, and one line a rollout) is read at once; the tokens lie in blocks, each read when one of its
rollouts is looked at. A part is zlib-compressed and base64; a block is the length of its JSON (4 bytes, little-endian),
the JSON, then for every token its entropy and the characters that it adds, as bytes: all low bytes, then all high ones.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heal_jax.gear import last_candidate
from heal_jax.report.data import KINDS, RunData
from heal_jax.report.repairs import choose
from heal_jax.report.view import END, View, view

BUDGET = 18 << 20  # bytes of blocks, in base64: with Plotly and the index the page stays under 25 MB
ROWS = 50_000  # rollouts that are listed at most
QUANTA = (0.001, 0.01, 0.05)  # nats; entropies are rounded to the first with which all tokens fit
BLOCK = 20_000  # tokens after which a block ends: small enough to be read in a few milliseconds
NO_ENTROPY = 65_535
GROUPS = 30  # values of a filter at most; the rarer ones are one group
OTHER = "other"
COLUMNS = ["problem_id", "rollout_id", "kind", "parent_id", "breakpoint_step", "kept_tokens", "prompt_tokens", "tokens",
           "context_tokens", "entropy", "step_starts", "finish", "grade", "pure_score", "step_ppl",
           "step_expected_ppl", "text", "answer"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Payload:
    """index, blocks: base64. left_out: what of the run is not in the page, in words; empty where all is."""

    index: str
    blocks: tuple[str, ...]
    left_out: str
    examples: tuple[str, ...]  # ids of rollouts to look at first
    listed: int


def pack(run: RunData, budget: int = BUDGET, most: int = ROWS) -> Payload:
    """All rollouts of a run, or as many as fit: repairs and the failures they came from first."""
    order, first = _order(run)
    listed = order[:most]
    blocks, firsts, quantum = _fitting(run, listed, budget)
    inside = firsts[-1]
    light = run.rollouts.take(pa.array(listed, pa.int64()))
    chosen = [row["rollout_id"] for row in choose(run)]
    index = _index(run, light, chosen) | {"quantum": quantum, "blocks": firsts}
    return Payload(
        _packed(_json(index)), tuple(blocks), _left_out(run, order, first, listed, inside), tuple(chosen), len(listed)
    )


def _order(run: RunData) -> tuple[list[int], int]:
    """Row numbers of all rollouts in the order of the index, and how many of them are repairs and their parents.

    These come first, those of problems with a kept repair before the others; within a problem as they are stored.
    """
    rows = run.rollouts.select(["problem_id", "rollout_id", "kind", "parent_id"]).to_pylist()
    parents = {row["parent_id"] for row in rows if row["kind"] == "repair"}
    repaired = {row["problem_id"] for row in rows if run.decisions.get(row["rollout_id"], {}).get("stage") == 3}
    place = {problem: i for i, problem in enumerate(dict.fromkeys(row["problem_id"] for row in rows))}

    def key(i: int) -> tuple[bool, bool, int, int]:
        row = rows[i]
        early = row["kind"] == "repair" or row["rollout_id"] in parents
        return not early, row["problem_id"] not in repaired, place[row["problem_id"]], i

    order = sorted(range(len(rows)), key=key)
    return order, sum(not key(i)[0] for i in order)


def _left_out(run: RunData, order: Sequence[int], first: int, listed: Sequence[int], inside: int) -> str:
    parts = []
    if len(listed) < len(order):
        parts.append(f"{len(order) - len(listed):,} of {len(order):,} rollouts are not listed")
    if inside < len(listed):
        what = "repairs and the failures that they came from are all in it" if inside >= first else "repairs come first"
        parts.append(f"the texts of {len(listed) - inside:,} listed rollouts are left out ({what})")
    if not parts:
        return ""
    return f"To keep this page small, {' and '.join(parts)}. `heal show {run.root.name} ROLLOUT_ID` prints any of them."


def _index(run: RunData, table: pa.Table, chosen: Sequence[str]) -> dict[str, Any]:
    """What the list needs, by columns."""
    columns = {name: table[name].to_pylist() for name in ("rollout_id", "problem_id", "kind", "grade", "answer",
               "parent_id", "pure_score", "breakpoint_step")}  # fmt: skip
    where = {rollout_id: i for i, rollout_id in enumerate(columns["rollout_id"])}
    decisions = [run.decisions.get(rollout_id, {}) for rollout_id in columns["rollout_id"]]
    names = list(dict.fromkeys(columns["problem_id"]))
    number = {name: i for i, name in enumerate(names)}
    problems = [run.problems.get(name, {}) for name in names]
    pure, gear = run.settings.pure, run.settings.gear
    lengths = pc.list_value_length(table["tokens"]).to_pylist()
    longest = max(pc.list_value_length(table["step_starts"]).to_pylist(), default=0) or 0
    rollouts = {
        "id": columns["rollout_id"],
        "problem": [number[name] for name in columns["problem_id"]],
        "parent": [where.get(name, -1) if name else -1 for name in columns["parent_id"]],
        "answer": columns["answer"],
        "score": [_number(score, 9) for score in columns["pure_score"]],  # as stored: it is compared
        "tokens": lengths,
        "entropy": [_number(value) for value in _means(table["entropy"])],
        "breakpoint": columns["breakpoint_step"],
        "stage": [d["stage"] if d else None for d in decisions],
        "reason": _coded([d.get("reason") or "" for d in decisions], len(decisions)),
        "why": _coded([_why(d) for d in decisions]),
        "kind": _coded(columns["kind"], first=KINDS),
        "grade": _coded(columns["grade"], first=("correct", "wrong", "unparsable", "truncated", "timeout")),
    }
    return {
        "rollouts": rollouts,
        "problems": {
            "id": names,
            "question": [_question(run, problem, table, name) for name, problem in zip(names, problems)],
            "answer": [problem.get("answer") for problem in problems],
            "rate": [_number(problem.get("pass_rate")) for problem in problems],
            "stratum": _coded(
                [problem.get("stratum") or "" for problem in problems], first=("solved", "hard", "unsolved")
            ),
            "level": _coded([problem.get("level") or "" for problem in problems]),
        },
        "examples": [where[name] for name in chosen if name in where],
        "settings": {
            "threshold": pure.threshold,
            "epsilon": pure.epsilon,
            "weight": pure.max_weight,
            "surge": gear.surge,
            "breakpoint": gear.breakpoint,
            "backup": gear.backup,
            "window": gear.window,
        },
        # By number of steps, the last step that may be the breakpoint.
        "window": last_candidate(longest, gear.window).tolist(),
    }


def _question(run: RunData, problem: dict[str, Any], table: pa.Table, name: str) -> str:
    if problem:
        return problem["question"] or ""
    at = pc.index(table["problem_id"], name).as_py()
    return run.question(table.slice(at, 1).select(["problem_id", "prompt_tokens"]).to_pylist()[0])


def _why(decision: dict[str, Any]) -> str:
    """The kind of a reason: without the figures and names in it."""
    if not decision:
        return "not decided yet"
    if decision["kept"]:
        return f"kept, stage {decision['stage']}"
    reason = decision["reason"] or "no reason given"
    return re.match(r"PURE|same tokens|over the|longer than|", reason)[0] or reason  # type: ignore[index]


def _coded(values: Sequence[str | None], most: int = GROUPS, first: Sequence[str] = ()) -> dict[str, Any]:
    """Values as numbers of names: `first` in their order, then by count; names beyond the `most` frequent are OTHER."""
    counts = Counter(value or "" for value in values)
    names = [name for name in first if name in counts]
    names += sorted((name for name in counts if name not in names), key=lambda name: (-counts[name], name))
    if len(names) > most:
        names = [*names[: most - 1], OTHER]
    number = {name: i for i, name in enumerate(names)}
    return {"names": names, "of": [number.get(value or "", len(names) - 1) for value in values]}


def _means(lists: pa.ChunkedArray) -> Iterator[float | None]:
    """The mean of each list; None for an empty one."""
    for part in lists.chunks:
        values, offsets = part.values.to_numpy(zero_copy_only=False), part.offsets.to_numpy()
        for start, end, valid in zip(offsets[:-1], offsets[1:], part.is_valid().to_pylist()):
            yield float(values[start:end].mean(dtype=np.float64)) if valid and end > start else None


def _fitting(run: RunData, rows: Sequence[int], budget: int) -> tuple[list[str], list[int], float]:
    """`_blocks` at the finest quantum with which all fit, or the coarsest. The last answer is kept: a run's page is
    written after every stage, and most stages add no rollout."""
    global _last
    folder = run.tokenizer.folder if run.tokenizer else None
    asked = hashlib.sha256(repr((run.settings, run.problems, folder, rows, budget)).encode(errors="replace"))
    for buffer in (b for column in run.rollouts.columns for chunk in column.chunks for b in chunk.buffers() if b):
        asked.update(buffer)
    if _last is not None and _last[0] == asked.digest():
        return _last[1]
    for quantum in QUANTA:
        blocks, firsts = _blocks(run, rows, quantum, budget)
        if firsts[-1] == len(rows):
            break
    _last = asked.digest(), (blocks, firsts, quantum)
    return _last[1]


_last: tuple[bytes, tuple[list[str], list[int], float]] | None = None


def _blocks(run: RunData, rows: Sequence[int], quantum: float, budget: int) -> tuple[list[str], list[int]]:
    """Blocks of the rows in their order until the budget is spent; the first row of each, and the first of none."""
    blocks: list[str] = []
    firsts, spent = [0], 0
    for views in _batches(run, rows):
        block = _packed(_block(views, quantum))
        if spent + len(block) > budget:
            break
        blocks.append(block)
        spent += len(block)
        firsts.append(firsts[-1] + len(views))
    return blocks, firsts


def _batches(run: RunData, rows: Sequence[int]) -> Iterator[list[tuple[View, int]]]:
    """Rollouts, each with how many of its first tokens are its parent's and need not be repeated."""
    table = run.rollouts.select(COLUMNS).combine_chunks()
    parents: dict[str, View] = {}
    problem, size = None, 0
    batch: list[tuple[View, int]] = []
    for start in range(0, len(rows), 256):
        for row in table.take(pa.array(rows[start : start + 256], pa.int64())).to_pylist():
            if row["problem_id"] != problem:
                problem, parents = row["problem_id"], {}
            found = view(run, row)
            if row["kind"] != "repair":
                parents[row["rollout_id"]] = found
            shared = _shared(found, parents.get(row["parent_id"] or ""))
            batch.append((found, shared))
            size += len(row["tokens"]) - shared
            if size >= BLOCK:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _shared(repair: View, parent: View | None) -> int:
    """Tokens of the kept prefix, where the parent begins with the same."""
    kept = repair.row["kept_tokens"] or 0
    if parent is None or not repair.shaded or not parent.shaded:
        return 0
    same = repair.row["tokens"][:kept] == parent.row["tokens"][:kept]
    same &= repair.texts[:kept] == parent.texts[:kept]
    return kept if same else 0


def _block(views: Sequence[tuple[View, int]], quantum: float) -> bytes:
    """Pieces are tokens, or steps where the texts of single tokens are not known. starts: each step's first piece,
    those that are the parent's counted too; end: the first piece of no step."""
    hints: dict[str, int] = {}
    names = ("text", "pieces", "shared", "kept", "kept_tokens", "ended", "shaded", "starts", "end", "h", "ppl",
             "expected", "answer", "hint", "finish")  # fmt: skip
    head: dict[str, list[Any]] = {name: [] for name in names}
    entropies: list[float | None] = []
    lengths: list[int] = []
    for found, shared in views:
        texts = list(found.texts[shared:])
        ended = bool(found.shaded and texts and texts[-1] == END)
        texts[-1:] = [""] if ended else texts[-1:]
        starts = [0]
        for step in found.steps:
            starts.append(starts[-1] + len(step.texts))
        head["text"].append("".join(texts))
        head["pieces"].append(len(texts))
        head["shared"].append(shared)
        head["kept"].append(found.kept_steps)
        head["kept_tokens"].append(found.row["kept_tokens"] or 0)
        head["ended"].append(int(ended))
        head["shaded"].append(int(found.shaded))
        head["starts"].append(starts[:-1])
        head["end"].append(found.after)
        head["h"].append([_number(step.entropy) for step in found.steps])
        scored = [step.scored for step in found.steps]
        head["ppl"].append([_number(s.ppl if s else None) for s in scored] if any(scored) else [])
        head["expected"].append([_number(s.expected if s else None) for s in scored] if any(scored) else [])
        head["answer"].append([_number(found.answer.ppl), _number(found.answer.expected)] if found.answer else None)
        head["hint"].append(hints.setdefault(found.hint, len(hints)))
        head["finish"].append(found.row["finish"])
        entropies += found.entropies[shared:]
        lengths += map(len, texts)
    data = _json({"hints": list(hints), **head})
    codes = np.full(len(entropies), NO_ENTROPY, np.int64)
    values = np.array(entropies, np.float64)
    known = np.isfinite(values)
    codes[known] = np.clip(np.rint(values[known] / quantum), 0, NO_ENTROPY - 1)
    return struct.pack("<I", len(data)) + data + _planes(codes) + _planes(np.minimum(lengths, 65_535))


def _planes(values: Any) -> bytes:
    """Numbers below 2^16 as their low bytes, then their high bytes: each compresses better by itself."""
    numbers = np.asarray(values, np.int64)
    return (numbers & 255).astype(np.uint8).tobytes() + (numbers >> 8).astype(np.uint8).tobytes()


def _number(value: float | None, digits: int = 5) -> float | str | None:
    """So many significant digits; what JavaScript's Number reads where it is infinite, None where it is no number."""
    if value is None or math.isnan(value):
        return None
    return float(f"{value:.{digits}g}") if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()  # ASCII: lone surrogates stay


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def elements(parts: Iterable[str], name: str) -> str:
    """Script elements that no browser runs; base64 holds nothing that ends one."""
    return "".join(f'<script type="application/octet-stream" class="{name}">{part}</script>\n' for part in parts)
