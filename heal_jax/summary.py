"""summary.json: the figures of a run (DESIGN section 5)."""

from pathlib import Path
from typing import Any

from heal_jax.config import GREEDY, MAIN
from heal_jax.evaluate import MODELS, compared
from heal_jax.run import Run
from heal_jax.sets import draws, further
from heal_jax.storage import shown
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
        summary |= _evaluation(run)
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


def _evaluation(run: Run) -> dict[str, Any]:
    """accuracy and difference of the main set, with `greedy` beside them where it is asked for; `sets`, where there are
    further ones: the same of each, by name.
    """
    found: dict[str, dict[str, Any]] = {}
    for draw in draws(run.config):
        figures = compared(run, draw)
        found[draw.set] = found[draw.set] | {GREEDY: figures} if draw.greedy else figures
    main = found.pop(MAIN)
    accuracy = {"accuracy": {name: main.pop(name) for name in MODELS}}
    return accuracy | main | ({"sets": found} if found else {})


def figures(root: Path) -> dict[str, Any]:
    """What a finished run has to say to programs, and where its outputs are."""
    summary = read_json(root / "summary.json")
    outputs = {"report": shown(root / "report.html"), "student": shown(root / "export")}
    return {name: summary[name] for name in ("accuracy", "difference")} | outputs


def verdict(root: Path) -> str:
    """The run in a few lines, for the terminal."""
    summary = read_json(root / "summary.json")
    lines = []
    for name, figures in summary["accuracy"].items():
        levels = "  ".join(f"{level or 'all'} {part['mean']:.1%}" for level, part in figures["per_level"].items())
        low, high = figures["ci95"]
        lines.append(f"{name:<18} {figures['mean']:6.1%} [{low:.1%}, {high:.1%}]  {levels}")
    lines.append(f"HEAL minus rejection sampling: {_signed(summary['difference'])}")
    for title, figures in further(summary):
        means = "  ".join(f"{name} {figures[name]['mean']:.1%}" for name in MODELS)
        lines.append(f"{title}: {means}  difference {_signed(figures['difference'])}")
    lines.append(f"report: {shown(root / 'report.html')}   student: {shown(root / 'export')}")
    return "\n".join(lines)


def _signed(figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['mean']:+.1%} [{low:+.1%}, {high:+.1%}]"
