"""The sections of the page on what was measured directly: breakpoints (`cuts`) and PURE (`shortcuts`)."""

from collections.abc import Iterable
from typing import Any

from heal_jax.ablate import figures
from heal_jax.report.markup import Html, number, percent, plot, table, tag


def entropy(cuts: dict[str, Any]) -> Iterable[Html]:
    yield tag(
        "p",
        f"{number(cuts['rollouts'])} failed rollouts of {number(cuts['problems'])} unsolved problems were cut after "
        f"each of their steps ({number(cuts['steps'], 1)} on average) and continued with the hint. Flawless: the right "
        "answer, and every step right by the world’s checker, kept ones included. The first wrong step lies in the "
        f"first third of {percent(cuts['first_wrong_in_window'])} of the chains.",
    )
    drawn = [
        tag("div", tag("h3", "By the distance of the cut from the first wrong step"),
            plot(figures.offsets(cuts), "flawless repairs by the distance of the cut from the first wrong step")),
        tag("div", tag("h3", "Flawless repairs a thousand tokens of the teacher"),
            plot(figures.cutting(cuts), "flawless repairs per thousand tokens for each rule")),
    ]  # fmt: skip
    yield tag("div", drawn, class_="two plots")
    rows = [[name, *(percent(where[part]) for part in ("before", "at", "after"))]
            for name, where in cuts["where"].items()]  # fmt: skip
    yield tag("h3", "Where breakpoints lie: before, at or after the first wrong step")
    yield table(["", "before", "at", "after"], rows)
    rules = []
    for name, rule in best(cuts):
        low, high = rule["flawless_per_1000_tokens"]["ci95"]
        per = number(rule["flawless_per_1000_tokens"]["mean"], 2)
        rules.append(
            [name, [per, tag("small", f"{low:.2f} to {high:.2f}")], percent(rule["flawless"]), percent(rule["correct"]),
             number(rule["tokens"]), percent(rule["kept"]), percent(rule["keeps_a_fault"])]
        )  # fmt: skip
    heads = ["", "flawless a 1,000 tokens", "flawless", "right answer", "tokens", "kept", "keeps a fault"]
    yield tag("details", tag("summary", "All rules"), table(heads, rules))


def best(cuts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rules of cutting, those with most flawless repairs for the teacher's tokens first."""
    return sorted(cuts["rules"].items(), key=lambda item: -item[1]["flawless_per_1000_tokens"]["mean"])


def purity(planted: dict[str, Any], natural: dict[str, Any]) -> Iterable[Html]:
    if planted.get("auc"):
        kinds = list(next(iter(planted["auc"].values())))
        rows = []
        for name, found in planted["auc"].items():
            cells = [[number(found[kind]["mean"], 3), _range(found[kind]["ci95"])] for kind in kinds]
            rows.append([name, *cells])
        yield tag("h3", "ROC-AUC of planted shortcuts")
        yield table(["", *kinds], rows)
        yield tag(
            "p",
            f"{number(planted['rollouts'])} right unaided rollouts, each spoilt in up to five ways, the answer staying "
            "true: a middle step removed, its result corrupted, two steps swapped, all steps replaced by the answer, "
            "another problem’s steps. 0.5 is chance. The threshold keeps "
            f"{percent(planted['kept_right'])} of those that were not spoilt. U: of fewer rollouts, where the answer "
            "was asked for after each step.",
            class_="caption",
        )
    rows = []
    for kind in ("hindsight", "repair"):
        part = natural.get(kind, {})
        for name, kept in part.get("kept", {}).items():
            rows.append(
                [f"{kind}, {name} threshold {natural['thresholds'][name]:.3f}", number(part["flawless"]),
                 percent(kept["flawless"]), number(part["flawed"]), percent(kept["flawed"]),
                 number(part["auc"]["default"], 3)]
            )  # fmt: skip
    if rows:
        yield tag("h3", "Right answers with the answer in view")
        yield table(["", "flawless", "of these kept", "flawed", "of these kept", "ROC-AUC"], rows)


def _range(ci95: list[float | None]) -> Html | None:
    return None if None in ci95 else tag("small", f"{ci95[0]:.3f} to {ci95[1]:.3f}")
