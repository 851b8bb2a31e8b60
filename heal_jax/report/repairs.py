"""Question 3 of the page: which rollouts to look at first, and what stands there without JavaScript."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, number, table, tag

PLAIN = 3  # repairs whose texts are shown without JavaScript
PLAIN_TEXT = 2000  # characters of each


def choose(run: RunData, count: int = 8) -> list[dict[str, Any]]:
    """Rows of repairs to show: half of them kept, half dropped; as few of one problem as can be.

    Those that keep a prefix come first; of the kept, those whose failure's entropy rises most at the breakpoint. Of the
    dropped, those that PURE dropped come first, then those that talk about the hint, then failures; what was dropped as
    one too many is last. Ties go by rollout_id.
    """
    columns = ["rollout_id", "problem_id", "kept_tokens", "parent_id", "breakpoint_step"]
    repairs = run.rollouts.filter(pc.equal(run.rollouts["kind"], "repair")).select(columns).to_pylist()
    decided = [row for row in repairs if row["rollout_id"] in run.decisions]
    if not decided:  # before `curate`: as they come
        return [
            row
            for item in _spread(sorted(repairs, key=_prefix_first))[:count]
            if (row := run.rollout(item["rollout_id"]))
        ]

    def reason(row: dict[str, Any]) -> str:
        return run.decisions[row["rollout_id"]]["reason"] or ""

    def rank(row: dict[str, Any]) -> int:
        starts = ("PURE", "talks", "wrong", "unparsable", "truncated", "timeout")
        return next((i for i, start in enumerate(starts) if reason(row).startswith(start)), len(starts))

    kept = [row for row in decided if run.decisions[row["rollout_id"]]["kept"]]
    dropped = [row for row in decided if not run.decisions[row["rollout_id"]]["kept"]]
    rise = _rises(run, kept)
    kept = _spread(sorted(kept, key=lambda row: (not row["kept_tokens"], -rise[row["rollout_id"]], row["rollout_id"])))
    dropped = _spread(sorted(dropped, key=lambda row: (rank(row), *_prefix_first(row))))
    half = max(count // 2, count - len(dropped)), max(count // 2, count - len(kept))
    pairs = [*kept[: half[0]], *dropped[: half[1]]][:count]
    return [found for row in pairs if (found := run.rollout(row["rollout_id"]))]


def _prefix_first(row: dict[str, Any]) -> tuple[bool, str]:
    return not row["kept_tokens"], row["rollout_id"]


def _rises(run: RunData, repairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By repair, how much the step entropy of its failure rises at the breakpoint; 0 where there is none."""
    wanted = pa.array([row["parent_id"] for row in repairs], pa.string())
    found = run.rollouts.filter(pc.is_in(run.rollouts["rollout_id"], wanted))
    parents = {row["rollout_id"]: row for row in found.select(["rollout_id", "entropy", "step_starts"]).to_pylist()}
    rises = {}
    for repair in repairs:
        parent, at = parents.get(repair["parent_id"]), repair["breakpoint_step"] or 0
        starts = [*parent["step_starts"], len(parent["entropy"])] if parent else []
        steps = [parent["entropy"][a:b] for a, b in zip(starts, starts[1:])][at - 1 : at + 1] if parent and at else []
        rises[repair["rollout_id"]] = fmean(steps[1]) - fmean(steps[0]) if len(steps) == 2 and all(steps) else 0.0
    return rises


def _spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each problem, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(seen.setdefault(row["problem_id"], 0))
        seen[row["problem_id"]] += 1
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def without_script(run: RunData, examples: Iterable[str]) -> Html:
    """A table of the examples, and the texts of the first."""
    rows: list[list[str]] = []
    texts: list[Html] = []
    for rollout_id in examples:
        row = run.rollout(rollout_id)
        if row is None:
            continue
        decision = run.decisions.get(rollout_id)
        rows.append([rollout_id, row["grade"], number(row["pure_score"], 3), verdict(decision)])
        if len(texts) < PLAIN:
            parent = run.rollout(row["parent_id"])
            texts.append(
                tag(
                    "article",
                    tag("h4", rollout_id),
                    tag("p", run.question(row), class_="question"),
                    *([tag("h4", "Failed rollout"), tag("pre", (parent["text"] or "")[:PLAIN_TEXT])] if parent else []),
                    tag("h4", "Repair"),
                    tag("pre", (row["text"] or "")[:PLAIN_TEXT]),
                )
            )
    note = tag("p", "The browser of all rollouts needs JavaScript; these are examples.", class_="todo")
    return tag("noscript", note, table(["repair", "grade", "S", "decision"], rows), texts)


def verdict(decision: dict[str, Any] | None) -> str:
    if decision is None:
        return "not decided yet"
    return f"kept, stage {decision['stage']}" if decision["kept"] else f"dropped: {decision['reason']}"
