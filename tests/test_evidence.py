"""The README's tables of what HEAL's parts are worth, from the ablations in configs/results/.

`python tests/test_evidence.py` prints them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from heal_jax import config, strict

ROOT = Path(__file__).parents[1]
WORLDS = ("sums", "rewriting", "legs")  # with all arms and measures
EVERY = (*WORLDS, "smollm2")
STUDENTS = {
    "sums-base": "`sums`, 0.4 M, a quarter of its pretraining",
    "sums": "`sums`, 0.4 M",
    "sums-large": "`sums`, 0.8 M",
    "sums-tuned": "`sums`, 0.4 M, tuned",
    "rewriting": "`rewriting`, 0.4 M",
    "legs": "`legs`, 0.4 M",
}
RULES = {
    "difference, window 1/3, backup 1": "**surge (difference), window 1/3, one step back**",
    "ratio, window 1/3, backup 1": "ratio",
    "zscore, window 1/3, backup 1": "z-score",
    "entropy, window 1/3, backup 1": "highest entropy",
    "difference, window 1/3, backup 0": "right before the surge",
    "difference, window 1/3, backup 2": "two steps back",
    "difference, window 2/3, backup 1": "window 2/3",
    "difference, window 1, backup 1": "window 1",
    "zscore, window 1, backup 1": "z-score, window 1",
    "random, window 1/3, backup 1": "random, window 1/3",
    "random, window 1, backup 1": "random, window 1",
    "restart": "restart with the hint",
    "oracle": "oracle: at the first wrong step",
}
READINGS = {
    "default": "**S**, lambda as by default",
    "lambda 0": "lambda 0",
    "lambda 1": "lambda 1",
    "without the answer": "without the answer step",
    "perplexity": "perplexity alone",
    "PPL / (U after + 0.01)": "U, the answer's certainty after a step, epsilon 0.01",
    "PPL / (U after + 1)": "U after a step, epsilon 1",
    "PPL / (U before + 1)": "U before a step, epsilon 1",
    "log-likelihood": "mean log-likelihood",
    "length": "length",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "configs" / "results" / f"ablation-{name}.json").read_text(encoding="utf-8"))


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(group: dict[str, Any] | None, scale: float = 100, form: str = "+.1f") -> str:
    if group is None or group["mean"] is None:
        return "–"
    low, high = (format(scale * x, form) for x in group["ci95"])
    return f"{scale * group['mean']:{form}} [{low}, {high}]"


def teachers(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, of in found.items():
        seeds, repairs = of["teacher"], of["arms"]["heal"]["repairs"]
        few = sum(sum(t["pass_rates"][:2]) / t["problems"] for t in seeds) / len(seeds)
        unsolved = sum(t["strata"]["unsolved"] for t in seeds) / len(seeds)
        rows.append(
            [
                f"`{name}`", f"{100 * few:.0f} % (of {seeds[0]['n']})", f"{unsolved:.0f} of {seeds[0]['problems']}",
                f"{100 * repairs['correct'] / repairs['candidates']:.0f} %",
                f"{repairs['problems_kept']} of {repairs['problems']}",
                *(f"{100 * of['before'][who]['mean']:.1f}" for who in ("teacher", "student_base")),
                *(f"{100 * of['arms'][arm]['accuracy']['mean']:.1f}" for arm in ("rejection_sampling", "heal")),
            ]
        )  # fmt: skip
    heads = ["", "at most 1 right", "unsolved", "repairs right", "problems with a kept repair", "teacher",
             "student before", "rejection sampling", "HEAL"]  # fmt: skip
    return table(heads, rows)


def spread(found: dict[str, dict[str, Any]]) -> str:
    """HEAL minus rejection sampling: of each seed, and were held-out problems of the levels that training's are of."""
    rows = []
    for name, of in found.items():
        difference, counts = of["arms"]["heal"]["difference"], of["config"]["problems"]["counts"]
        levels = difference["per_level"]
        mixed = sum(count * levels[level]["mean"] for level, count in counts.items()) / sum(counts.values())
        by_seed = ", ".join(f"{100 * x:+.1f}" for x in difference["per_seed"])
        rows.append([f"`{name}`", interval(difference), by_seed, f"{100 * mixed:+.1f}"])
    return table(["HEAL minus rejection sampling", "", "by seed", "in training's mix of levels"], rows)


def arms(found: dict[str, dict[str, Any]], key: str, head: str) -> str:
    """Of each arm the difference to rejection sampling, or HEAL's to it."""
    every = [name for name, arm in next(iter(found.values()))["arms"].items() if key in arm]
    rows = [
        [f"`{name}`", *(interval(of["arms"].get(name, {}).get(key)) for of in found.values())]
        for name in every
        if name != "rejection_sampling"
    ]
    return table([head, *(f"`{name}`" for name in found)], rows)


def parts(found: dict[str, dict[str, Any]], by: str) -> str:
    """HEAL's and equal tokens' differences by level or stratum."""
    rows = []
    for name, of in found.items():
        for arm in ("equal_tokens", "heal"):
            groups = of["arms"][arm]["difference"][by]
            rows.append([f"`{name}`, `{arm}`", *(interval(groups.get(part)) for part in ("easy", "medium", "hard"))])
    return table(["minus rejection sampling", "easy", "medium", "hard"], rows)


def costs(found: dict[str, dict[str, Any]]) -> str:
    def cell(cost: dict[str, Any] | None) -> str:
        if not cost or cost["tokens"] is None:
            return "–"
        return f"{cost['tokens']:,} ({cost['seconds']:.2g})"

    rows = [
        [
            f"`{name}`",
            *(
                cell(of["arms"].get(name, {"per_problem": {}})["per_problem"].get("over_student_base"))
                for of in found.values()
            ),
        ]
        for name in next(iter(found.values()))["arms"]
    ]
    return table(["teacher tokens (seconds) a problem", *(f"`{name}`" for name in found)], rows)


def cuts(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for rule, said in RULES.items():
        where = rule.rpartition(", backup")[0] or rule
        cells = []
        for of in found.values():
            at = of["cuts"]["where"].get(where, {}).get("at")
            per = interval(of["cuts"]["rules"][rule]["flawless_per_1000_tokens"], 1, ".2f")
            cells += ["–" if at is None else f"{100 * at:.0f}", per]
        rows.append([said, *cells])
    return table(["the cut", *(text for name in found for text in (f"`{name}`: at, %", "flawless / 1,000"))], rows)


def planted(found: dict[str, dict[str, Any]]) -> str:
    kinds = ("removed", "corrupted", "swapped", "replaced", "foreign")
    rows = []
    for reading, said in READINGS.items():
        worst = []
        for of in found.values():
            aucs = {kind: of["planted"]["auc"][reading][kind]["mean"] for kind in kinds}
            kind, auc = min(((k, a) for k, a in aucs.items() if a is not None), key=lambda pair: pair[1])
            worst.append(f"{auc:.2f}" + (f" ({kind})" if auc < 0.995 else ""))
        natural = []
        for of in found.values():
            auc = of["natural"]["repair"]["auc"].get(reading)
            natural.append("–" if auc is None else f"{auc:.2f}")
        rows.append([said, *worst, *natural])
    heads = [f"`{name}`: planted, worst kind" for name in found] + [f"`{name}`: flawed repairs" for name in found]
    return table(["", *heads], rows)


def kept(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, of in found.items():
        for kind in ("repair", "hindsight"):
            group = of["natural"][kind]
            shares = [group["kept"][how][what] for how in ("fixed", "calibrated") for what in ("flawless", "flawed")]
            counts = f"{group['flawless']}, {group['flawed']}"
            rows.append([f"`{name}`, {kind}", counts, *(f"{100 * share:.0f} %" for share in shares)])
    heads = ["", "flawless, flawed", "1.12 keeps of flawless", "of flawed", "calibrated: of flawless", "of flawed"]
    return table(heads, rows)


def hints(of: dict[str, Any]) -> str:
    rows = []
    for name, arm in of["arms"].items():
        if name == "heal" or name.startswith("hint_"):
            hint = of["config"]["gear"]["hint"].strip() if name == "heal" else arm["what"].removeprefix("hint: ")
            repairs = arm["repairs"]
            right, leaked = repairs["correct"] / repairs["candidates"], repairs["leaked"] / max(1, repairs["correct"])
            kept = f"{repairs['problems_kept']} of {repairs['problems']}"
            figures = [f"{100 * right:.1f} %", f"{100 * leaked:.1f} %", kept]
            rows.append([f"`{name}`: {hint}", *figures, interval(arm.get("heal_minus"))])
    return table(
        ["the hint", "repairs right", "of these talk about it", "problems with a kept repair", "HEAL minus"], rows
    )


def students(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, of in found.items():
        arms = of["arms"]
        gains = [interval(arms[arm]["gain"]) for arm in ("curated_few", "rejection_sampling", "heal")]
        before = f"{100 * of['before']['student_base']['mean']:.1f}"
        rows.append([STUDENTS[name], before, *gains, interval(arms["heal"]["difference"])])
    heads = ["the student", "before", "`curated_few`", "`rejection_sampling`", "`heal`",
             "`heal` minus `rejection_sampling`"]  # fmt: skip
    return table(heads, rows)


def tables() -> dict[str, str]:
    every = {name: load(name) for name in EVERY}
    found = {name: every[name] for name in WORLDS}
    return {
        "teachers": teachers(every),
        "spread": spread(found),
        "arms": arms(every, "difference", "minus rejection sampling"),
        "worth": arms(every, "heal_minus", "HEAL minus"),
        "levels": parts(found, "per_level"),
        "costs": costs(every),
        "cuts": cuts(found),
        "planted": planted(found),
        "kept": kept(found),
        "hints": hints(load("hints")),
        "students": students({name: load(name) for name in STUDENTS}),
    }


@pytest.fixture(scope="module")
def made():
    return tables()


NAMES = ("teachers", "spread", "arms", "worth", "levels", "costs", "cuts", "planted", "kept", "hints", "students")


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_the_table(made, name):
    assert made[name] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EVERY)
def test_the_results_are_those_of_the_shipped_config(name):
    path = ROOT / "configs" / ("ablate" if name in WORLDS else "") / f"{name}.yaml"
    assert load(name)["config"] == json.loads(json.dumps(strict.to_dict(config.load(path))))


def test_the_longer_run_of_legs():
    """What the README says of it, and of how it was made."""
    text, found = (ROOT / "README.md").read_text(encoding="utf-8"), load("legs-long")
    settings = {"sample.batch": 240, "gear.paths": 6, "train.steps": 400, "evaluate.samples": 4}
    assert " ".join(f"--{name} {value}" for name, value in settings.items()) in text
    made = strict.override(config.load(ROOT / "configs" / "ablate" / "legs.yaml"), settings)
    assert found["config"] == json.loads(json.dumps(strict.to_dict(made)))
    of = found["arms"]["heal"]["difference"]
    assert interval(of) in text and ", ".join(f"{100 * x:+.1f}" for x in of["per_seed"]) in text


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}")
