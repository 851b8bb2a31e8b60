"""summary.json: the figures of a run (DESIGN section 5)."""

from pathlib import Path
from typing import Any

from heal_jax.evaluate import MODELS, accuracy, interval, problem_means
from heal_jax.run import Run
from heal_jax.store import read_json, write_json


def summarise(run: Run) -> dict[str, Any]:
    """What the finished stages found; figures of stages that have not run are absent."""
    manifest = run.directory.manifest
    stages = {name: record for name in manifest["stages"] if (record := run.directory.done(name)) is not None}
    summary: dict[str, Any] = {"problems": len(run.problems), "hygiene": run.hygiene}
    if "sample" in stages:
        strata = list(stages["sample"]["strata"].values())
        solved, unsolved = strata.count("solved"), strata.count("unsolved")
        # hard holds the unsolved: solved + hard = problems
        summary["strata"] = {"solved": solved, "hard": len(strata) - solved, "unsolved": unsolved}
    if "curate" in stages:
        repair, hindsight = stages["curate"]["repair"], stages["curate"]["hindsight"]
        summary["repair"] = {
            "problems": repair["problems"],
            "repaired_problems": repair["problems_kept"],
            **{name: repair[name] for name in ("candidates", "correct", "leaked", "kept", "duplicates")},
        }
        summary["hindsight"] = {
            name: hindsight[name] for name in ("problems", "candidates", "correct", "leaked", "kept", "duplicates")
        }
        summary["stages"] = stages["curate"]["stages"]
        if "retokenised" in stages["curate"]:  # the student has another tokenizer than the teacher
            summary["retokenised"] = stages["curate"]["retokenised"]
    if "train" in stages:
        summary["training"] = stages["train"]
    if "evaluate" in stages:
        means = {name: problem_means(run, name) for name in MODELS}
        summary["accuracy"] = {name: accuracy(run, values) for name, values in means.items()}
        summary["difference"] = _difference(run, means["heal"] - means["rejection_sampling"])
    work = manifest.get("work", {})

    def rate(*names: str) -> float:
        seconds = sum(work.get(name, {}).get("seconds", 0.0) for name in names)
        return round(sum(work.get(name, {}).get("tokens", 0) for name in names) / seconds, 1) if seconds else 0.0

    summary["throughput"] = {
        "sample_tokens_per_s": rate("sample", "hindsight", "repair"),
        "train_tokens_per_s": rate("train heal", "train rejection_sampling"),
    }
    seconds: dict[str, float] = {}
    for name, account in work.items():  # "train heal" and "train rejection_sampling" are one stage
        stage = name.split()[0]
        seconds[stage] = round(seconds.get(stage, 0.0) + account["seconds"], 3)
    summary["seconds"] = seconds
    write_json(run.root / "summary.json", summary)
    return summary


def _difference(run: Run, values: Any) -> dict[str, Any]:
    """Paired by problem: values [problems] are differences."""
    return {"mean": float(values.mean()), "ci95": interval(values, run.config.evaluate.resamples, run.config.seed)} | {
        "per_level": {name: {k: v for k, v in part.items() if k != "n"} for name, part in
                      accuracy(run, values)["per_level"].items()}
    }  # fmt: skip


def verdict(root: Path) -> str:
    """The run in a few lines, for the terminal."""
    summary = read_json(root / "summary.json")
    lines = []
    for name, figures in summary["accuracy"].items():
        levels = "  ".join(f"{level or 'all'} {part['mean']:.1%}" for level, part in figures["per_level"].items())
        low, high = figures["ci95"]
        lines.append(f"{name:<20} {figures['mean']:6.1%}  [{low:.1%}, {high:.1%}]  {levels}")
    low, high = summary["difference"]["ci95"]
    lines.append(f"HEAL minus rejection sampling: {summary['difference']['mean']:+.1%} [{low:+.1%}, {high:+.1%}]")
    lines.append(f"report: {root / 'report.html'}   student: {root / 'export'}")
    return "\n".join(lines)
