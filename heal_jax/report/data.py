"""What a run directory holds so far. What is not there yet is empty; what cannot be read is named in `notes`."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heal_jax.config import Config
from heal_jax.config import load as load_config
from heal_jax.errors import InputError
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.report.forms import DEV, SUMMARY, TRAIN, WORK, fits
from heal_jax.store import DECISIONS, EVALUATION, PROBLEMS, ROLLOUTS, RunDirectory, read_json, read_table
from heal_jax.world import model_folder

KINDS = ("base", "hindsight", "repair")


@dataclasses.dataclass
class RunData:
    """A run, finished or not. `config` is None where config.yaml is not there or does not fit this version."""

    root: Path
    config: Config | None
    manifest: dict[str, Any]
    problems: dict[str, dict[str, Any]]  # by id
    rollouts: pa.Table
    decisions: dict[str, dict[str, Any]]  # by rollout_id
    evaluation: pa.Table
    training: list[dict[str, Any]]  # metrics.jsonl, event train
    dev: list[dict[str, Any]]  # metrics.jsonl, event dev, each with the step of its student
    summary: dict[str, Any]
    tokenizer: Tokenizer | None
    notes: list[str]

    @property
    def work(self) -> dict[str, dict[str, Any]]:
        """Seconds and tokens by what took them, from the manifest."""
        found: dict[str, dict[str, Any]] = self.manifest.get("work", {})
        return found if fits(found, WORK) else {}

    @property
    def settings(self) -> Config:
        """The run's config, or the defaults where it could not be read."""
        return self.config or Config()

    def rollout(self, rollout_id: str | None) -> dict[str, Any] | None:
        """The row of a rollout, or None."""
        found = self.rollouts.filter(pc.equal(self.rollouts["rollout_id"], pa.scalar(rollout_id, pa.string())))
        return found.to_pylist()[0] if found.num_rows else None

    def question(self, row: dict[str, Any]) -> str:
        """The question of a rollout's problem; where problems.parquet is not there, its prompt."""
        problem = self.problems.get(row["problem_id"])
        if problem is not None:
            return problem["question"] or ""
        try:
            return self.tokenizer.text(row["prompt_tokens"]) if self.tokenizer else ""
        except IndexError:  # another tokenizer than the run's
            return ""

    def outcomes(self) -> list[tuple[str, str, str, dict[str, Any]]]:
        """problem_id, kind, grade and decision ({} while there is none) of every rollout."""
        columns = (self.rollouts[name].to_pylist() for name in ("problem_id", "kind", "grade", "rollout_id"))
        return [(p, kind, grade, self.decisions.get(i, {})) for p, kind, grade, i in zip(*columns, strict=True)]


def load(root: Path) -> RunData:
    """Read a run directory. Raises InputError where it is none."""
    if not (root / "manifest.json").is_file() and not (root / "config.yaml").is_file():
        raise InputError(
            f"{root}: not a run directory (no manifest.json, no config.yaml); give the --out of `heal run`"
        )
    directory = RunDirectory(root)
    notes: list[str] = []

    def read(path: Path, reader: Callable[[Path], Any], empty: Any) -> Any:
        if not path.exists():
            return empty
        try:
            if directory.damaged(path):
                raise InputError(f"{path}: changed or damaged since it was written; run again to make it anew")
            return reader(path)
        except InputError as error:
            notes.append(str(error))
            return empty

    def rollouts(kind: str) -> pa.Table:
        return read(root, lambda _: directory.rollouts(kind), ROLLOUTS.empty_table())

    problems = read(root / "problems.parquet", read_table, PROBLEMS.empty_table()).to_pylist()
    decisions = read(root / "decisions.parquet", read_table, DECISIONS.empty_table()).to_pylist()
    shards = sorted((root / "evaluation").glob("*.parquet"))
    summary = read(root / "summary.json", _summary, {})
    config = read(root / "config.yaml", load_config, None)
    training, dev = read(root / "metrics.jsonl", _training, ([], []))
    return RunData(
        root=root,
        config=config,
        manifest=directory.manifest,
        problems={problem["id"]: problem for problem in problems},
        rollouts=pa.concat_tables([rollouts(kind) for kind in KINDS]),
        decisions={decision["rollout_id"]: decision for decision in decisions},
        evaluation=pa.concat_tables([read(path, read_table, EVALUATION.empty_table()) for path in shards])
        if shards
        else EVALUATION.empty_table(),
        training=training,
        dev=dev,
        summary=summary,
        tokenizer=_tokenizer(directory.manifest, config.teacher.path if config else "", notes),
        notes=notes,
    )


def _summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    if not fits(summary, SUMMARY):
        raise InputError(f"{path}: not a summary of heal_jax; run again to make it anew")
    return summary


def _training(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The train and dev events. An interrupted run leaves a torn line, and repeats steps when it goes on: the last
    counts. What lies before train_anew is of another curriculum. A student is asked dev problems after the step that
    was logged last.
    """
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    dev: dict[tuple[str, int], dict[str, Any]] = {}
    latest: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for line in text.split("\n"):
        try:
            event = json.loads(line)
            if event["event"] == "train_anew":
                steps, dev, latest = {}, {}, {}
            elif event["event"] == "train" and fits(event, TRAIN):
                steps[event["model"], event["step"]] = event
                latest[event["model"]] = event["step"]
            elif event["event"] == "dev" and fits(event, DEV) and event["model"] in latest:
                step = latest[event["model"]]
                dev[event["model"], step] = {**event, "step": step}
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return [steps[key] for key in sorted(steps)], [dev[key] for key in sorted(dev)]


def _tokenizer(manifest: dict[str, Any], path: str, notes: list[str]) -> Tokenizer | None:
    """The teacher's tokenizer, where its folder can still be opened. `path`: the teacher as the config has it; a
    built-in one is here, too, when the run comes from another machine."""
    try:
        teacher = manifest["models"]["teacher"]
        kind, _, name = path.partition(":")
        moved = kind == "builtin" and not Path(teacher["path"]).is_dir()
        return Tokenizer(model_folder(name) if moved else teacher["path"], teacher["vocab_size"])
    except (KeyError, TypeError):
        notes.append("The manifest names no teacher yet: rollouts are shown as plain text, without entropies.")
    except InputError as error:
        notes.append(f"The teacher's tokenizer cannot be opened, so rollouts are shown as plain text: {error}")
    return None


def grades(evaluation: pa.Table) -> dict[str, dict[str, int]]:
    """Samples of each grade, by model."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in evaluation.select(["model", "grade"]).to_pylist():
        counts[row["model"]][row["grade"]] += 1
    return counts
