"""Where did the data come from? Problems and rollouts on their way to the three stages."""

from collections.abc import Iterable
from typing import Any

from heal_jax.report import figures, numbers
from heal_jax.report.data import RunData
from heal_jax.report.markup import Html, number, percent, plot, table, tag, todo


def where_from(run: RunData) -> Iterable[Html]:
    problems = figures.sampled(run)
    curated = "curate" in run.manifest["stages"]
    if problems and run.rollouts.num_rows and (run.decisions or not curated):
        yield plot(figures.flow(run), "flow of problems through the method", wide=True)
        yield tag(
            "p",
            "Every problem is drawn once, to the latest stage that learns from it. Unsolved problems try repairs "
            "first, then hindsight, as the other hard ones do: a problem goes on as far as one of its rollouts does. "
            "Stage 1 takes right unaided rollouts.",
            class_="caption",
        )
        links = [
            [f"{figures.NODES[a]} → {figures.NODES[b]}", number(n)] for (a, b), n in numbers.problem_flow(run).items()
        ]
        yield tag("details", tag("summary", "The flow in numbers"), table(["", "problems"], links))
    elif curated:
        yield tag(
            "p",
            "The flow of problems is not drawn: problems.parquet, decisions.parquet or the rollouts are not there.",
            class_="todo",
        )
    if not curated:
        yield todo("the flow of problems to the three stages (heal hindsight, heal repair, heal curate).")
    yield tag("div", *_counts(run.summary), class_="two")
    if problems:
        n, most = run.settings.sample.n, run.settings.gear.max_correct
        ceiling = sum(p["stratum"] == "unsolved" for p in problems)
        yield tag("h3", "The teacher’s ceiling")
        yield plot(figures.pass_rates(run), "histogram of the pass rates of the problems")
        yield tag(
            "p",
            f"{ceiling} of {len(problems)} problems ({percent(ceiling / len(problems))}) lie above the ceiling: at "
            f"most {most} of {n} unaided rollouts solve them. Rejection sampling learns next to nothing from these.",
            class_="caption",
        )
        rows = [[number(right), number(count)] for right, count in sorted(figures.hits(problems, n).items())]
        head = [f"correct of {n}", "problems"]
        yield tag("details", tag("summary", "Problems by correct rollouts"), table(head, rows))
    else:
        yield todo("pass rates of the problems (heal sample).")


def _counts(summary: dict[str, Any]) -> Iterable[Html]:
    """The counts of the summary, as tables."""
    strata, repair, hindsight = (summary.get(name) for name in ("strata", "repair", "hindsight"))
    if strata:
        rows = [["problems", number(summary.get("problems"))], ["solved", number(strata["solved"])]]
        rows += [["hard", number(strata["hard"])], ["of these unsolved", number(strata["unsolved"])]]
        rows += [["repaired (a repair is kept)", number(repair["repaired_problems"])]] if repair else []
        yield table(["Problems", ""], rows)
    if repair or hindsight:
        names = ("problems", "candidates", "correct", "leaked", "duplicates", "kept")
        titles = {"leaked": "talk about the hint", "duplicates": "same tokens as another"}
        rows = [
            [titles.get(name, name), *(number((part or {}).get(name)) for part in (hindsight, repair))]
            for name in names
        ]
        yield table(["Aided rollouts", "hindsight", "repair"], rows)
    if summary.get("stages"):
        rows = [[f"stage {k}", number(s["examples"]), number(s["tokens"])] for k, s in summary["stages"].items()]
        yield table(["Curriculum", "examples", "tokens"], rows)
