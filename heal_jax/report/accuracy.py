"""Did it help? The accuracies of teacher and students on held-out problems."""

from collections.abc import Iterable, Mapping
from typing import Any

from heal_jax.report import figures, numbers
from heal_jax.report.data import RunData, grades
from heal_jax.report.markup import Html, join, number, percent, plot, points, table, tag, todo
from heal_jax.sets import further


def did_it_help(run: RunData) -> Iterable[Html]:
    accuracy, difference = run.summary.get("accuracy"), run.summary.get("difference")
    if difference:
        yield tag("p", sentence(difference, accuracy or {}), class_="lead")
    if not accuracy:
        yield todo("the accuracies of teacher and students on held-out problems (heal evaluate).")
    else:
        yield from _main_set(run, accuracy, difference)
    if others := further(run.summary):
        names = [*figures.MODELS]
        rows = [
            [
                join([title, tag("small", f" n = {found[names[0]]['n']}")]),
                *(_interval(found.get(model)) for model in names),
                _interval(found.get("difference"), points),
            ]
            for title, found in others
        ]
        yield tag("h3", "Also evaluated")
        yield table(["", *figures.MODELS.values(), "Difference"], rows)
        yield tag("p", "Further sets, and one greedy sample a problem; levels are in summary.json.", class_="caption")
    counted = grades(run.evaluation)
    if counted:
        kinds = sorted({grade for model in counted.values() for grade in model}, key=lambda g: (g != "correct", g))
        order = [*(m for m in figures.MODELS if m in counted), *(m for m in sorted(counted) if m not in figures.MODELS)]
        rows = [[figures.MODELS.get(m, m), *(number(counted[m].get(kind, 0)) for kind in kinds)] for m in order]
        yield tag("details", tag("summary", "Grades of the evaluation samples"), table(["", *kinds], rows))


def _main_set(run: RunData, accuracy: dict[str, Any], difference: dict[str, Any] | None) -> Iterable[Html]:
    names = figures.levels(accuracy)
    strata = numbers.by_teacher(run)
    drawn = [
        tag(
            "div",
            tag("h3", "By level" if names else "All problems"),
            plot(figures.accuracies(run), "accuracy of the four models, 95 % intervals", wide=len(names) > 4),
        )
    ]
    if strata:
        drawn.append(
            tag(
                "div",
                tag("h3", "By what the teacher solves"),
                plot(figures.by_teacher(run), "accuracy of the four models on problems that the teacher solves or not"),
            )
        )
    yield tag("div", drawn, class_="two plots")
    sizes = next(iter(accuracy.values()))
    groups: list[tuple[Any, dict[str, Any]]] = [
        (_heading("all", sizes["n"]), {**accuracy, "difference": difference}),
        *(
            (
                _heading(name or "no level", sizes["per_level"][name]["n"]),
                {model: found["per_level"].get(name) for model, found in accuracy.items()}
                | {"difference": (difference or {}).get("per_level", {}).get(name)},
            )
            for name in names
            if name in sizes["per_level"]
        ),
        *((_heading(f"teacher: {name}", part["teacher"]["n"]), part) for name, part in strata.items()),
    ]
    rows = [[title, *(_interval(part.get(model)) for _, part in groups)] for model, title in figures.MODELS.items()]
    if difference:
        rows.append(["Difference", *(_interval(part.get("difference"), points) for _, part in groups)])
    yield table(["", *(title for title, _ in groups)], rows)
    few = (
        "Solved, hard and unsolved go by the share of the teacher’s evaluation samples of a problem that are right, "
        "with the bounds of training; its own marks follow from that."
    )
    yield tag(
        "p",
        "Mean over problems of the share of right samples (pass@1), with 95 % bootstrap intervals over problems; "
        "n is the number of problems. The difference, HEAL minus rejection sampling in percentage points, is "
        "paired by problem. ",
        few if strata else None,
        class_="caption",
    )


def _heading(name: str, count: int) -> Html:
    return join([name, tag("small", f" n = {count}")])


def sentence(difference: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """The difference with its interval, in words."""
    mean, (low, high) = difference["mean"], difference["ci95"]
    parts = []
    if "heal" in accuracy and "rejection_sampling" in accuracy:
        ours, theirs = (percent(accuracy[name]["mean"]) for name in ("heal", "rejection_sampling"))
        parts.append(
            f"The HEAL student is right in {ours} of held-out samples, the rejection-sampling student {theirs}:"
        )
    parts.append(f"a difference of {points(mean)} points, 95 % interval {points(low)} to {points(high)}.")
    if None not in (low, high) and low <= 0 <= high:
        parts.append("The interval holds 0, so this run alone does not show a difference.")
    text = " ".join(parts)
    return text[0].upper() + text[1:]


def _interval(group: Mapping[str, Any] | None, unit: Any = percent) -> Any:
    if not group or group.get("mean") is None:
        return "–"
    low, high = (unit(value).removesuffix(" %") for value in group["ci95"])
    return [unit(group["mean"]), tag("small", f"{low} to {high}")]
