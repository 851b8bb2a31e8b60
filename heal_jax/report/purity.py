"""Is PURE sane? The scores on both sides of the threshold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from heal_jax.report import figures, numbers
from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, number, percent, plot, rollout_link, table, tag, todo

MOST_BARS = 60  # steps of a long rollout are drawn in groups, each by its largest ratio


def is_pure_sane(run: RunData) -> Iterable[Html]:
    several, limit = numbers.scores(run), run.settings.pure.threshold
    if not several:
        yield todo("PURE scores (heal sample).")
        return
    below = {kind: float(np.mean(one.right <= limit)) for kind, one in several.items() if len(one.right)}
    parts = [f"{percent(below[kind])} of {_right(kind)}" for kind in figures.KINDS if kind in below]
    if parts:
        text = f"At or below the threshold of {limit:g} lie {', '.join(parts)}."
        yield tag("p", text, class_="lead")
    yield tag(
        "p",
        "The PURE score S is near 1 where the teacher, without the hint, could have written every step itself, and "
        "grows where a step or the answer comes out of nowhere. The teacher’s own right rollouts show what is natural: "
        "a sane threshold keeps most of them, and cuts off the tail of those that saw the answer. Unaided rollouts are "
        "not filtered: they are here to compare with. The teacher’s own mistakes come naturally to it, too: the grade "
        "finds these, not S.",
    )
    yield plot(figures.scores(run), "distribution of the PURE scores of rollouts, and the threshold")
    yield from _tables(run, several, limit)
    if missing := [name for name in ("hindsight", "repair") if name not in run.manifest["stages"]]:
        yield todo(f"the scores of aided rollouts ({', '.join(f'heal {name}' for name in missing)}).")
    kept, dropped = numbers.nearest(run)
    for name, rows in ((f"Just kept (S ≤ {limit:g})", kept), (f"Just dropped (S > {limit:g})", dropped)):
        if rows:
            yield tag("h3", name)
            yield _examples(run, rows, limit)
    if kept or dropped:
        yield tag(
            "p",
            "Right aided rollouts whose S is nearest to the threshold, no two of one problem. A bar is the ratio of a "
            "scored step, perplexity over expected perplexity, the answer last; in colour where it is over "
            f"{limit:g}. S weighs their mean and their largest. Each name leads to the rollout itself.",
            class_="caption",
        )


def _right(kind: str) -> str:
    return {"base": "the right unaided rollouts", "hindsight": "the right hindsight rollouts"}.get(
        kind, "the right repairs"
    )


def _tables(run: RunData, several: Mapping[str, numbers.Scores], limit: float) -> Iterable[Html]:
    taken = {kind: 0 for kind in several}
    for _, kind, _, decision in run.outcomes():
        if kind in taken and decision.get("kept"):
            taken[kind] += 1
    rows = []
    for kind, one in several.items():
        for name, values in (("right", one.right), ("not right", one.other)):
            if len(values):
                low = values <= limit
                cells = [
                    number(len(values)),
                    number(float(np.median(values)), 3),
                    number(int(low.sum())),
                    percent(low.mean()),
                ]
                final = number(taken[kind]) if name == "right" and run.decisions else "–"
                rows.append([f"{figures.KINDS[kind]}, {name}", *cells, final])
    yield table(["", "scored", "median S", f"S ≤ {limit:g}", "share", "in a stage"], rows)
    yield tag(
        "p",
        "Of what PURE keeps, the same tokens count once and a problem gives a stage at most "
        f"{run.settings.pace.per_problem} ",
        "example" if run.settings.pace.per_problem == 1 else "examples",
        ", the lowest S first. Aided rollouts that are not right, or talk about the hint, are dropped before.",
        class_="caption",
    )
    edges = numbers.score_bins(several, limit)
    columns = [
        (f"{figures.KINDS[kind]}, {name}", numbers.binned(values, edges))
        for kind, one in several.items()
        for name, values in (("right", one.right), ("not right", one.other))
        if len(values)
    ]
    names = [*(f"{a:.3f} to {b:.3f}" for a, b in zip(edges[:-1], edges[1:], strict=True)), f"over {edges[-1]:.3f}"]
    body = [[name, *(number(int(counts[i])) for _, counts in columns)] for i, name in enumerate(names)]
    yield tag(
        "details", tag("summary", "The distribution in numbers"), table(["S", *(name for name, _ in columns)], body)
    )


def _examples(run: RunData, rows: Sequence[Mapping[str, Any]], limit: float) -> Html:
    shown = []
    several = [numbers.ratios(row, run.settings.pure.epsilon) for row in rows]
    top = max([limit, *(ratio for found in several for ratio in found if np.isfinite(ratio))])
    for row, found in zip(rows, several, strict=True):
        decision = run.decisions.get(row["rollout_id"])
        at = int(np.argmax(found)) if found else 0
        largest = f"{number(found[at], 2)}, step {at + 1} of {len(found)}" if found else "–"
        shown.append(
            [
                rollout_link(row["rollout_id"]),
                number(row["pure_score"], 4),
                _bars(found, limit, top),
                number(float(np.mean(found)) if found else None, 3),
                largest,
                number(found[-1] if found else None, 2),
                "not decided yet" if decision is None else _fate(decision),
            ]
        )
    return table(
        ["", "S", "ratio of each step", "mean", "largest", "last", "what became of it"], shown, class_="examples"
    )


def _fate(decision: Mapping[str, Any]) -> str:
    return f"kept, stage {decision['stage']}" if decision["kept"] else str(decision["reason"])


def _bars(found: Sequence[float], limit: float, top: float) -> Html:
    """A bar a step, as high as its ratio on a scale from 0 to `top`."""
    each = -(-len(found) // MOST_BARS) or 1
    groups = [max(found[i : i + each]) for i in range(0, len(found), each)]
    bars = [
        tag("i", class_="high" if ratio > limit else None, style=f"height:{100 * min(ratio, top) / top:.0f}%")
        for ratio in groups
    ]
    text = ", ".join(number(ratio, 2) for ratio in groups)
    return tag("span", bars, class_="ratios", role="img", aria_label=f"ratios: {text}", title=text)
