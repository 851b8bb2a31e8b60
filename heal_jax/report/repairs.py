"""The repairs that the page shows beside the failures they came from."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.compute as pc

from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, join, number, percent, tag
from heal_jax.report.view import END, Scored, Step, Token, View, view

SHADES = 10  # classes s0..s9 of the style sheet
LONG = 2000  # tokens of a rollout after which steps are left out: each token is an element of the page


def choose(run: RunData, count: int = 8) -> list[dict[str, Any]]:
    """Rows of repairs to show: half of them kept (lowest S first), half dropped; as few of one problem as can be.

    Those that keep a prefix come first. Of the dropped, those that PURE dropped come first, then those that talk about
    the hint, then failures; what was dropped as one too many is last. Ties go by rollout_id.
    """
    columns = ["rollout_id", "problem_id", "kept_tokens", "pure_score"]
    repairs = run.rollouts.filter(pc.equal(run.rollouts["kind"], "repair")).select(columns).to_pylist()
    decided = [row for row in repairs if row["rollout_id"] in run.decisions]
    if not decided:  # before `curate`: as they come
        return [
            row
            for item in _spread(sorted(repairs, key=_prefix_first))[:count]
            if (row := run.rollout(item["rollout_id"]))
        ]

    def score(row: dict[str, Any]) -> float:
        return math.inf if row["pure_score"] is None else row["pure_score"]

    def reason(row: dict[str, Any]) -> str:
        return run.decisions[row["rollout_id"]]["reason"] or ""

    def rank(row: dict[str, Any]) -> int:
        starts = ("PURE", "talks", "wrong", "unparsable", "truncated", "timeout")
        return next((i for i, start in enumerate(starts) if reason(row).startswith(start)), len(starts))

    kept = [row for row in decided if run.decisions[row["rollout_id"]]["kept"]]
    dropped = [row for row in decided if not run.decisions[row["rollout_id"]]["kept"]]
    kept = _spread(sorted(kept, key=lambda row: (_prefix_first(row)[0], score(row), row["rollout_id"])))
    dropped = _spread(sorted(dropped, key=lambda row: (rank(row), *_prefix_first(row))))
    half = max(count // 2, count - len(dropped)), max(count // 2, count - len(kept))
    pairs = [*kept[: half[0]], *dropped[: half[1]]][:count]
    return [found for row in pairs if (found := run.rollout(row["rollout_id"]))]


def _prefix_first(row: dict[str, Any]) -> tuple[bool, str]:
    return not row["kept_tokens"], row["rollout_id"]


def _spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each problem, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(seen.setdefault(row["problem_id"], 0))
        seen[row["problem_id"]] += 1
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def pairs(run: RunData, count: int = 8) -> list[tuple[View, View | None]]:
    """Chosen repairs with their parents."""
    found = []
    for row in choose(run, count):
        parent = run.rollout(row["parent_id"])
        found.append((view(run, row), view(run, parent) if parent else None))
    return found


def top_entropy(shown: Sequence[tuple[View, View | None]]) -> float:
    """The end of the page's one colour scale, in tenths of a nat, without the top 1 %: outliers make the rest pale."""
    values = sorted(t.entropy for t in _tokens(shown) if t.entropy is not None and math.isfinite(t.entropy))
    high = values[int(0.99 * (len(values) - 1))] if values else 0.0
    return max(0.1, math.ceil(high * 10 - 1e-6) / 10)


def _tokens(shown: Sequence[tuple[View, View | None]]) -> Iterator[Token]:
    for pair in shown:
        for one in pair:
            for step in one.steps if one else ():
                yield from step.tokens


def legend(top: float) -> Html:
    cells = [tag("i", Html("&nbsp;"), class_=f"t s{i}") for i in range(SHADES)]
    return tag(
        "p", "token entropy, nats: 0 ", tag("span", cells, class_="ramp"), f" {top:.1f} or more", class_="legend"
    )


def card(run: RunData, repair: View, parent: View | None, top: float) -> Html:
    """One repair beside its parent."""
    row = repair.row
    problem = run.problems.get(row["problem_id"], {})
    decision = run.decisions.get(row["rollout_id"])
    title = [tag("span", row["rollout_id"], class_="id"), " ", verdict(decision)]
    facts = [f"level {problem['level']}"] if problem.get("level") else []
    facts += [f"pass rate {percent(problem['pass_rate'])}", f"true answer {problem['answer']}"] if problem else []
    if row["pure_score"] is not None:
        sign = "≤" if row["pure_score"] <= run.settings.pure.threshold else ">"
        facts.append(f"PURE score S {number(row['pure_score'], 3)} {sign} threshold {run.settings.pure.threshold:g}")
    if decision and not decision["kept"]:
        facts.append(f"reason: {decision['reason']}")
    return tag(
        "article",
        tag("h3", title),
        tag("p", repair.question, class_="question"),
        tag("p", " · ".join(facts), class_="facts"),
        tag(
            "div",
            tag("div", failure(parent, row, top) if parent else tag("p", "The failed rollout is not there.")),
            tag("div", mended(repair, top)),
            class_="pair",
        ),
        class_="card",
    )


def verdict(decision: dict[str, Any] | None) -> Html:
    if decision is None:
        return tag("span", "not decided yet", class_="badge")
    kept = bool(decision["kept"])
    return tag(
        "span", f"kept, stage {decision['stage']}" if kept else "dropped", class_="badge kept" if kept else "badge"
    )


def failure(parent: View, repair: dict[str, Any], top: float) -> Html:
    """The failed rollout, with breakpoint and cut."""
    kept, at = repair["kept_tokens"] or 0, repair["breakpoint_step"]
    starts = parent.row["step_starts"] or [0]
    cut = sum(start < kept for start in starts)
    rows: list[Html] = []
    before: float | None = None
    for step in _shortened(parent.steps, (cut, cut if at is None else at)):
        if isinstance(step, int):
            rows.append(_bar("left", f"{step} steps left out", 4))
            before = None
            continue
        if step.number == cut:
            rows.append(_bar("cut", f"cut: {cut or 'no'} step{'s' * (cut != 1)} kept, {kept} tokens", 4))
        rise = None if before is None or step.entropy is None else step.entropy - before
        note = tag("span", "breakpoint", class_="chip") if step.number == at else None
        figures = [
            ("entropy", _figure(step.entropy)),
            ("rise", "–" if rise is None else _signed(rise)),
        ]
        state = " ".join(["broken"] * (step.number == at) + ["kept"] * (step.number < cut))
        rows.append(_step(str(step.number), [_shaded(step, top), note], figures, state))
        before = step.entropy
    head = tag("h4", "Failed rollout ", tag("span", parent.row["rollout_id"], class_="id"))
    where = "no breakpoint: a single step" if at is None else f"breakpoint: step {at}"
    caption = f"graded {parent.row['grade']}, answer {parent.row['answer'] or 'none'}, {where}"
    return join([head, tag("p", caption, class_="facts"), _steps(["entropy", "rise"], rows)])


def mended(repair: View, top: float) -> Html:
    """Kept prefix, hint and continuation, with what PURE measured."""
    names = ["entropy", "PPL", "expected", "ratio"]
    rows: list[Html] = []
    nothing = None if repair.kept_steps else "nothing is kept; the continuation starts anew"
    hint = [tag("b", nothing or "kept so far; the teacher alone now sees"), " ", _visible(repair.hint)]
    for step in _shortened(repair.steps, (repair.kept_steps,)):
        if isinstance(step, int):
            rows.append(_bar("left", f"{step} steps left out", 6))
            continue
        if step.number == repair.kept_steps:
            rows.append(_bar("hint", hint, 6))
        figures = [("entropy", _figure(step.entropy)), *_scored(step.scored)]
        kept = [(name, "") for name in names]
        rows.append(_step(str(step.number), _shaded(step, top), kept if step.kept else figures, "kept" * step.kept))
    if repair.kept_steps == len(repair.steps):  # it ended at once
        rows.append(_bar("hint", hint, 6))
    if repair.answer:
        figures = [("entropy", ""), *_scored(repair.answer)]
        rows.append(_step("A", ["answer ", tag("b", repair.row["answer"] or "")], figures, "answer"))
    caption = f"graded {repair.row['grade']}, finish: {repair.row['finish']}"
    if repair.row["step_ppl"] is None:
        caption += ", not scored by PURE"
    return join([tag("h4", "Repair"), tag("p", caption, class_="facts"), _steps(names, rows)])


def _shortened(steps: Sequence[Step], near: Sequence[int]) -> list[Step | int]:
    """The steps to show; of a long rollout the beginning, the end and those near the cut, and how many are left out."""
    shown: list[Step | int] = []
    tokens = 0
    for step in steps:
        tokens += len(step.tokens)
        last = shown[-1] if shown else None
        if tokens <= LONG or step.number >= len(steps) - 2 or any(abs(step.number - at) <= 2 for at in near):
            shown.append(step)
        elif isinstance(last, int):
            shown[-1] = last + 1
        else:
            shown.append(1)
    return shown


def _scored(scored: Scored | None) -> list[tuple[str, str]]:
    if scored is None:
        return [("PPL", "–"), ("exp.", "–"), ("ratio", "–")]
    return [
        ("PPL", number(scored.ppl, 2)),
        ("exp.", number(scored.expected, 2)),
        ("ratio", number(scored.ratio, 2)),
    ]


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no minus before a zero


def _figure(value: float | None) -> str:
    return number(value, 2)


def _steps(names: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("tr", [tag("th", name, scope="col") for name in ("", "step", *names)])
    return tag("table", tag("thead", head), tag("tbody", rows), class_="steps")


def _step(name: str, text: Any, figures: Sequence[tuple[str, str]], state: str) -> Html:
    cells = [tag("td", value, data_label=label if value else None) for label, value in figures]
    return tag("tr", tag("th", name, scope="row"), tag("td", text, class_="text"), cells, class_=state or None)


def _bar(kind: str, text: Any, columns: int) -> Html:
    return tag("tr", tag("td", text, colspan=columns), class_=kind)


def _shaded(step: Step, top: float) -> Html:
    """The text of a step, each token on a shade of its entropy."""
    parts = []
    for token in step.tokens:
        if token.entropy is None or not math.isfinite(token.entropy):
            parts.append(tag("span", _visible(token.text)))
            continue
        shade = min(SHADES - 1, int(max(0.0, token.entropy) / top * SHADES))
        title = f"{token.entropy:.3f} nats"
        parts.append(tag("i", _visible(token.text), class_=f"t s{shade}" + " end" * (token.text == END), title=title))
    return join(parts)


def _visible(text: str) -> Html:
    """Newlines can be seen: a token of newlines alone has an entropy too."""
    marked = [tag("span", "↵", class_="newline") if part == "\n" else part for part in _split_newlines(text)]
    return join(marked)


def _split_newlines(text: str) -> list[str]:
    parts: list[str] = []
    for i, line in enumerate(text.split("\n")):
        parts += ["\n"] * (i > 0) + [line] * bool(line)
    return parts
