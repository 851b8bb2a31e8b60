"""A run: configuration, problems, models and directory, checked before anything is written."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from heal_jax import __version__
from heal_jax.config import Config, dump, flatten, to_dict, validate
from heal_jax.config import load as load_config
from heal_jax.errors import InputError, RunError
from heal_jax.model.config import decoder_config
from heal_jax.model.lm import LanguageModel, open_model, open_tokenizer, resolve
from heal_jax.model.mesh import make_mesh
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import check as check_weights
from heal_jax.problems.grading import Grader
from heal_jax.problems.sources import Problem, check_disjoint, load
from heal_jax.progress import Progress
from heal_jax.shapes import bucket
from heal_jax.store import RunDirectory, folder_sha256, write_text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets")
FREE_BYTES = 1 << 30  # what a run may leave behind on a small configuration, with room to spare


@dataclasses.dataclass
class Run:
    """What every stage works with. Models are loaded when first used."""

    config: Config
    directory: RunDirectory
    problems: list[Problem]
    held_out: list[Problem]
    grader: Grader
    progress: Progress
    mesh: jax.sharding.Mesh

    @property
    def root(self) -> Path:
        return self.directory.root

    @functools.cached_property
    def teacher(self) -> LanguageModel:
        return open_model(self.config.teacher, self.mesh)

    @functools.cached_property
    def student(self) -> LanguageModel:
        """The student before training."""
        return open_model(self.config.student, self.mesh)

    @functools.cached_property
    def by_id(self) -> dict[str, Problem]:
        """The training problems."""
        return {problem.id: problem for problem in self.problems}

    @functools.cached_property
    def prompts(self) -> dict[str, tuple[int, ...]]:
        """The plain prompt of each training problem."""
        prompt = self.teacher.tokenizer.prompt
        return {problem.id: tuple(prompt(plain_question(self.config, problem))) for problem in self.problems}

    @contextlib.contextmanager
    def work(self, stage: str, tokens: list[int] | None = None) -> Iterator[None]:
        """Adds the seconds inside (and what was put in `tokens`) to the stage's account in the manifest."""
        start = time.perf_counter()
        yield
        account = self.directory.manifest.setdefault("work", {}).setdefault(stage, {"seconds": 0.0, "tokens": 0})
        account["seconds"] = round(account["seconds"] + time.perf_counter() - start, 3)
        account["tokens"] += sum(tokens or ())

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl. A torn last line of an interrupted run is closed first."""
        path = self.root / "metrics.jsonl"
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps({"event": event, **values}) + "\n").encode())


@contextlib.contextmanager
def open_run(
    config: Config, out: Path, progress: Progress, needs: Sequence[str] = (), command: str = ""
) -> Iterator[Run]:
    """Check everything, then create or reopen the directory.

    `needs` are stages that must have finished. Raises InputError, with nothing written, for a bad config, problem file
    or model folder, problems that are also held out, prompts too long for a model, too little disk, a stage that must
    come first, and a directory made with another config.
    """
    validate(config)
    problems = load(config.problems, config.grade.by)
    held_out = load(config.evaluate.problems, config.grade.by, "evaluate.problems")
    check_disjoint(problems, held_out)
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    folders = {"teacher": resolve(config.teacher), "student": resolve(config.student)}
    tokenizer = open_tokenizer(folders["teacher"])
    _same_prompts_and_ids(tokenizer, open_tokenizer(folders["student"]), plain_question(config, problems[0]))
    _fits(config, tokenizer, [*problems, *held_out], list(folders.values()))
    for folder in dict.fromkeys(folders.values()):
        check_weights(folder)
    facts = {
        "models": {
            name: {
                "path": str(folder),
                "sha256": folder_sha256(folder),
                "vocab_size": decoder_config(folder).vocab_size,
            }
            for name, folder in folders.items()
        },
        "problems": _hash([(p.id, p.question, p.answer) for p in (*problems, *held_out)]),
    }
    _reopen(config, out, facts, needs)
    _writable(out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out), Grader(config.grade) as grader:
        directory = _reopen(config, out, facts, needs)  # again: another process may have worked in it until now
        if not (out / "config.yaml").is_file():
            write_text(out / "config.yaml", dump(config))
        circumstances = {
            "heal_jax": __version__,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processor": _processor()},
            "mesh": dict(mesh.shape),
            "threads": int(os.environ.get("NPROC", os.cpu_count() or 1)),
        }
        begun = {name: directory.manifest[name] for name in circumstances if name in directory.manifest}
        if not begun:
            seeds = {"run": config.seed, "problems": config.problems.seed, "evaluate": config.evaluate.problems.seed}
            directory.update(**circumstances, seeds=seeds, command=command, **facts)
        elif begun != circumstances:
            changed = [name for name in circumstances if begun.get(name) != circumstances[name]]
            progress.say(f"note: {', '.join(changed)} differ from when {out} was begun; the bytes may, too")
            directory.update(also=[*directory.manifest.get("also", []), circumstances])
        yield Run(config, directory, problems, held_out, grader, progress, mesh)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _processor() -> str:
    """The processor's model name: rounding may differ between types."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _same_prompts_and_ids(teacher: Tokenizer, student: Tokenizer, question: str) -> None:
    """The student trains on the teacher's token ids: vocabulary, EOS and prompts must be the same."""
    pairs = {
        "vocabulary": (teacher.hf.get_vocab(), student.hf.get_vocab()),
        "EOS ids": (set(teacher.eos_ids), set(student.eos_ids)),
        "chat template": (teacher.prompt(question), student.prompt(question)),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InputError(
                f"{teacher.folder} and {student.folder}: teacher and student must share the {what}; "
                "use a student of the teacher's family"
            )


def _writable(out: Path) -> None:
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: cannot be written ({parent} is not a folder that you may write); give another --out")
    if (free := shutil.disk_usage(parent).free) < FREE_BYTES:
        raise InputError(f"{out}: {free >> 20} MiB of disk are free, {FREE_BYTES >> 20} are wanted; free some space")


def _fits(config: Config, tokenizer: Tokenizer, problems: list[Problem], folders: list[Path]) -> None:
    """Longest context and rollout against the models' positions."""
    hint = max(len(tokenizer.encode(hint_text(config, p))) for p in problems)
    shown = max(
        len(tokenizer.prompt(question(config, p)))
        for p in problems
        for question in (plain_question, hindsight_question)
    )
    need = bucket(shown) + bucket(hint) + bucket(config.sample.max_new_tokens)
    for folder in folders:
        if need > (have := decoder_config(folder).max_positions):
            raise InputError(
                f"{folder}: {need} positions are needed (prompt {shown}, hint {hint}, {config.sample.max_new_tokens} "
                f"new tokens), the model has {have}; lower sample.max_new_tokens or leave out long problems"
            )


def plain_question(config: Config, problem: Problem) -> str:
    """The user turn of unaided rollouts, training examples and evaluation."""
    return config.sample.prompt.replace("{question}", problem.question)


def hindsight_question(config: Config, problem: Problem) -> str:
    """The user turn with the answer in view."""
    # One pass over the template: questions and answers may hold braces.
    fields = {"{question}": problem.question, "{answer}": problem.answer}
    return re.sub(r"\{question\}|\{answer\}", lambda match: fields[match[0]], config.hindsight.prompt)


def hint_text(config: Config, problem: Problem) -> str:
    """What follows the kept prefix in the teacher's context."""
    return config.gear.hint.replace("{answer}", problem.answer)


def _reopen(config: Config, out: Path, facts: dict[str, Any], needs: Sequence[str]) -> RunDirectory:
    """The directory as it is. Raises InputError where it was made with another config, other models or other problems,
    or where a stage has not finished.
    """
    directory = RunDirectory(out)
    path = out / "config.yaml"
    if path.is_file():
        try:
            old = flatten(to_dict(load_config(path)))
        except InputError as error:
            raise InputError(f"{error}; damaged, or of another version: use another --out") from None
        new = flatten(to_dict(config))
        changes = [
            f"{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        if changes:
            raise InputError(f"{out}: made with another config ({'; '.join(changes)}); use another --out")
    before = directory.manifest
    if "problems" in before and before["problems"] != facts["problems"]:
        raise InputError(f"{out}: its problems have changed since it was begun; use another --out")
    for name, model in before.get("models", {}).items():
        if model["sha256"] != facts["models"][name]["sha256"]:
            raise InputError(f"{out}: its {name} has changed since it was begun; use another --out")
    for stage in needs:
        if directory.done(stage) is None:
            raise InputError(f"{out}: stage {stage} has not finished; run `heal {stage}` or `heal run` first")
    return directory


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One process a directory. Raises RunError where another one works in it."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{out}: another process is working in it; wait for it or use another --out") from None
        yield
