"""A run: configuration, problems, models and directory, checked before anything is written."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
from jax.sharding import Mesh

from heal_jax import __version__, processes, storage, trackers
from heal_jax.config import Config, dump, validate
from heal_jax.config import load as load_config
from heal_jax.divide import require, sizes, undivided
from heal_jax.errors import InputError
from heal_jax.lock import holder, lock
from heal_jax.model.config import decoder_config
from heal_jax.model.lm import LanguageModel, open_model, open_tokenizer, resolve
from heal_jax.model.mesh import batch_parts, make_mesh
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import adapter_rows
from heal_jax.model.weights import check as check_weights
from heal_jax.problems import hygiene
from heal_jax.problems.grading import Grade, Grader
from heal_jax.problems.sources import Problem, load
from heal_jax.processors import processor, threads
from heal_jax.progress import Progress
from heal_jax.sets import load_sets, place
from heal_jax.shapes import positions, train_rows
from heal_jax.store import ROLLOUTS, RunDirectory, digest, folder_sha256, set_aside, write_text
from heal_jax.strict import flatten, to_dict

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets")
PUSH_SECONDS = 30  # between copies of metrics.jsonl to a bucket while a training goes on
FREE_BYTES = 1 << 30  # what a run may leave behind on a small configuration, with room to spare


@dataclasses.dataclass
class Run:
    """What every stage works with. Models are loaded when first used."""

    config: Config
    directory: RunDirectory
    problems: list[Problem]  # after hygiene
    evaluation: dict[str, list[Problem]]  # of every evaluation set, by its name (config.MAIN, DEV)
    hygiene: dict[str, int]  # how many were loaded, left out for each reason, and kept
    grader: Grader
    progress: Progress
    mesh: Mesh
    tokenizers: dict[str, Tokenizer]  # of teacher and student, at hand without their weights
    again: list[str] = dataclasses.field(default_factory=list)  # stages to do again, since something was damaged

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

    def release_teacher(self) -> None:
        """Let go of the teacher's weights, so that the memory is there for others; they are loaded again when used."""
        self.__dict__.pop("teacher", None)

    @functools.cached_property
    def by_id(self) -> dict[str, Problem]:
        """The training problems."""
        return {problem.id: problem for problem in self.problems}

    @functools.cached_property
    def prompts(self) -> dict[str, tuple[int, ...]]:
        """The plain prompt of each training problem, as the teacher has it."""
        return plain_prompts(self.config, self.tokenizers["teacher"], self.problems)

    @functools.cached_property
    def student_prompts(self) -> dict[str, tuple[int, ...]]:
        """The same as the student has it."""
        return plain_prompts(self.config, self.tokenizers["student"], self.problems)

    @functools.cached_property
    def same_ids(self) -> bool:
        """Whether the student trains on the teacher's ids as sampled; otherwise on its own ids of the same text."""
        teacher, student = self.tokenizers["teacher"], self.tokenizers["student"]
        return (
            teacher.hf.get_vocab() == student.hf.get_vocab()
            and set(teacher.eos_ids) == set(student.eos_ids)
            and self.prompts == self.student_prompts
        )

    @property
    def evaluation_problems(self) -> list[Problem]:
        """The problems of all evaluation sets, dev included: none may be trained on."""
        return _all_of(self.evaluation)

    @functools.cached_property
    def evaluation_prompts(self) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
        """The prompt of each evaluation problem: by model (teacher, student), set and id."""
        return {
            model: {name: plain_prompts(self.config, tokenizer, several) for name, several in self.evaluation.items()}
            for model, tokenizer in self.tokenizers.items()
        }

    @contextlib.contextmanager
    def work(self, stage: str, tokens: list[int] | None = None) -> Iterator[None]:
        """Adds the seconds inside (and what was put in `tokens`) to the stage's account in the manifest."""
        start = time.perf_counter()
        yield
        account = self.directory.manifest.setdefault("work", {}).setdefault(stage, {"seconds": 0.0, "tokens": 0})
        account["seconds"] = round(account["seconds"] + time.perf_counter() - start, 3)
        account["tokens"] += sum(tokens or ())

    def shard(
        self,
        stage: str,
        name: str,
        make: Callable[[], list[dict[str, Any]]],
        schema: pa.Schema = ROLLOUTS,
        owner: int = 0,
    ) -> pa.Table:
        """`RunDirectory.shard`; says so where an interruption of this stage costs more than checkpoint.seconds."""
        start = time.monotonic()
        table, made = self.directory.shard(name, make, schema, owner)
        took, most = time.monotonic() - start, self.config.checkpoint.seconds
        if made and took > most and stage not in self._slow:
            self._slow.add(stage)
            self.progress.say(
                f"note: {name} took {took:.0f} s, more than checkpoint.seconds ({most:g}), and an interruption costs a "
                "shard; in another run, fewer sample.rounds or a smaller sample.batch make them smaller"
            )
        return table

    @functools.cached_property
    def _slow(self) -> set[str]:
        """Stages of which it was said."""
        return set()

    def grade(self, items: Sequence[tuple[Problem, str, str]], owner: int) -> list[Grade]:
        """Grades of (problem, text, finish), decided by process `owner`: a deadline may fall differently elsewhere."""
        graded = processes.once(lambda: [dataclasses.astuple(g) for g in self.grader.grade_many(items)], by=owner)
        return [Grade(*values) for values in graded]

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl. A torn last line of an interrupted run is closed first."""
        if not processes.primary():
            return
        path = self.root / "metrics.jsonl"
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps({"event": event, **values}) + "\n").encode())
        storage.push(self.root, PUSH_SECONDS)


@contextlib.contextmanager
def open_run(
    config: Config, out: Path, progress: Progress, needs: Sequence[str] = (), command: str = ""
) -> Iterator[Run]:
    """Check everything, then create or reopen the directory.

    `needs` are stages that must have finished. Raises InputError, with nothing written, for a bad config, problem file
    or model folder, training problems of which hygiene leaves none, answers that nothing can be compared with, prompts
    too long for a model, too little disk, a bucket that cannot be written, a stage that must come first, and a
    directory made with another config.
    """
    validate(config)
    trackers.require(config.log)
    loaded = load(config.problems, config.grade.by)
    evaluation = load_sets(config)
    problems, removed = hygiene.clean(loaded, _all_of(evaluation), config.hygiene)
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    folders = {"teacher": resolve(config.teacher), "student": resolve(config.student)}
    split = sizes(config, {name: decoder_config(folder) for name, folder in folders.items()})
    require(mesh.shape, split)
    if config.train.lora.rank:
        adapter_rows(decoder_config(folders["student"]), config.train.lora.targets)
    tokenizers = {name: open_tokenizer(folder) for name, folder in folders.items()}
    asked = digest([(p.id, p.question, p.answer) for p in (*problems, *_all_of(evaluation))])
    processes.alike(
        "start all with the same command, on the same files",
        config=dump(config),
        stages=repr(needs),
        versions=repr(_versions()),
        problems=asked,
        tokenizers=repr([tokenizers[name].prompt("State 1 + 2.") for name in folders]),
    )
    _fits(config, tokenizers, problems, evaluation)
    _opens_no_thinking(config, tokenizers["teacher"], plain_question(config, problems[0]))
    for folder in dict.fromkeys(folders.values()):
        processes.once(functools.partial(check_weights, folder))
    facts = {
        "models": {
            name: {
                "path": str(folder),
                **dict(zip(("sha256", "files"), processes.once(functools.partial(folder_sha256, folder)))),
                "vocab_size": decoder_config(folder).vocab_size,
            }
            for name, folder in folders.items()
        },
        "problems": asked,
    }
    with storage.opened(out) as out, contextlib.ExitStack() as stack, Grader(config.grade) as grader:
        directory = _reopen(config, out, facts, needs)
        _writable(out)

        def enter() -> Any:
            if "problems" not in directory.manifest and config.grade.unreadable == "refuse":
                _readable(grader, [*problems, *_all_of(evaluation)])
            stack.enter_context(lock(out, command, progress.say))
            # Again: another process may have worked in it until now.
            inside = _reopen(config, out, facts, needs, progress.say)
            _enter(inside, config, mesh, facts, command, progress)
            write_text(out / hygiene.FILE, hygiene.to_json_lines(removed))
            return inside.manifest, inside.verify(progress.say)

        directory.manifest, again = processes.once(enter)
        storage.pull(out)
        processes.alike("give an --out on a file system that all share", out=holder(out))
        for size in undivided(mesh.shape, split):
            progress.say(f"note: the mesh does not divide {size.what}; it stays whole on every device")
        rows = train_rows(config.train, batch_parts(mesh))
        if empty := rows - config.train.batch:
            progress.say(f"note: {empty} of {rows} rows of a training step are empty; train.batch {rows} wastes none")
        figures = hygiene.counts(loaded, removed)
        counts = {
            "training": len(problems),
            **({"left_out": len(removed)} if removed else {}),
            "held_out": len(_all_of(evaluation)),
        }
        progress.update("problems", len(loaded), len(loaded), counts=counts)
        if removed:
            progress.say(f"hygiene    {hygiene.described(figures)}: see {out / hygiene.FILE}")
        yield Run(config, directory, problems, evaluation, figures, grader, progress, mesh, tokenizers, again)


def _enter(
    directory: RunDirectory, config: Config, mesh: Mesh, facts: dict[str, Any], command: str, progress: Progress
) -> None:
    """Write the config of a new directory, and under what circumstances it is worked in."""
    out = directory.root
    path, text = out / "config.yaml", dump(config)
    if path.is_file() and directory.manifest.get("config") == digest(text) and not _holds(path, text):
        progress.say(f"note: {path}: damaged; set aside as {set_aside(path, '.damaged').name} and written again")
    if not path.is_file():
        write_text(path, text)
    circumstances = {
        "heal_jax": __version__,
        "versions": _versions(),
        "python": platform.python_version(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processor": processor()},
        "processes": processes.count(),
        "mesh": dict(mesh.shape),
        "threads": threads(),
    }
    begun = {name: directory.manifest[name] for name in circumstances if name in directory.manifest}
    if not begun:
        seeds = {"run": config.seed, "problems": config.problems.seed, "evaluate": config.evaluate.problems.seed}
        directory.update(**circumstances, seeds=seeds, command=command, config=digest(text), **facts)
    elif begun != circumstances:
        changed = [name for name in circumstances if begun.get(name) != circumstances[name]]
        progress.say(f"note: {', '.join(changed)} differ from when {out} was begun; the bytes may, too")
        directory.update(also=[*directory.manifest.get("also", []), circumstances])


def _holds(path: Path, text: str) -> bool:
    return path.read_bytes() == text.encode(errors="replace")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def plain_prompts(config: Config, tokenizer: Tokenizer, problems: Sequence[Problem]) -> dict[str, tuple[int, ...]]:
    """The prompt of each problem, by id."""
    return {problem.id: tuple(tokenizer.prompt(plain_question(config, problem))) for problem in problems}


def _readable(grader: Grader, problems: Sequence[Problem]) -> None:
    """Raise InputError where math-verify cannot read reference answers that it is to compare with."""
    if unreadable := grader.unreadable(problems):
        (first, reason), others = unreadable[0], [p.place for p, _ in unreadable[1:]]
        named = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
        raise InputError(
            f"{first.place}: no answer can be compared with {first.answer[:80]!r} as mathematics ({reason})"
            + (f"; {len(others)} more: {named}" if others else "")
            + "; leave out or rewrite what is refused, or set grade.unreadable: text to compare it as text"
        )


def _writable(out: Path) -> None:
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: cannot be written ({parent} is not a folder that you may write); give another --out")
    if (free := shutil.disk_usage(parent).free) < FREE_BYTES:
        raise InputError(f"{out}: {free >> 20} MiB of disk are free, {FREE_BYTES >> 20} are wanted; free some space")


def _all_of(evaluation: dict[str, list[Problem]]) -> list[Problem]:
    return [problem for several in evaluation.values() for problem in several]


def _fits(
    config: Config,
    tokenizers: dict[str, Tokenizer],
    problems: list[Problem],
    evaluation: dict[str, list[Problem]],
) -> None:
    """Longest context and rollout of each model against its positions; the student sees no hints."""
    teacher = tokenizers["teacher"]
    questions = (plain_question, hindsight_question)
    shown = max(len(teacher.prompt(question(config, p))) for p in problems for question in questions)
    hint = max(len(teacher.encode(hint_text(config, p))) for p in problems)
    for name, tokenizer in tokenizers.items():

        def longest(several: list[Problem], tokenizer: Tokenizer = tokenizer) -> int:
            return max(map(len, plain_prompts(config, tokenizer, several).values()))

        most, limit = config.sample.max_new_tokens, "sample.max_new_tokens"
        asked = [(shown, hint, most, limit) if name == "teacher" else (longest(problems), 0, most, limit)]
        for one, several in evaluation.items():
            own = config.evaluate.all_sets[one].max_new_tokens
            asked.append((longest(several), 0, own or most, f"{place(one)}.max_new_tokens" if own else limit))
        have = decoder_config(tokenizer.folder).max_positions
        for prompt, after, new, field in asked:
            if (need := positions(prompt + after, new)) > have:
                raise InputError(
                    f"{tokenizer.folder}: {need} positions are needed (prompt {prompt}, hint {after}, {new} new "
                    f"tokens), the {name} has {have}; lower {field} or leave out long problems"
                )


def _opens_no_thinking(config: Config, teacher: Tokenizer, question: str) -> None:
    """Raise InputError where the prompt ends with grade.think_open: that is for models that write it themselves."""
    tag = config.grade.think_open.strip()
    if tag and teacher.text(teacher.prompt(question)).rstrip().endswith(tag):
        raise InputError(
            f"grade.think_open: {tag!r} ends the teacher's prompt already: its chat template opens the thinking part; "
            "leave grade.think_open empty"
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


def _reopen(
    config: Config,
    out: Path,
    facts: dict[str, Any],
    needs: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
) -> RunDirectory:
    """The directory as it is. Raises InputError where it was made with another config, other models or other problems,
    or where a stage has not finished.
    """
    directory = RunDirectory(out, say)
    path = out / "config.yaml"
    # The manifest knows the config, too: then config.yaml may be damaged.
    if path.is_file() and directory.manifest.get("config") != digest(dump(config)):
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
        if model["sha256"] != (now := facts["models"][name])["sha256"]:
            was, is_now = model.get("files", {}), now["files"]
            differ = "; ".join(
                f"{file}: {was.get(file, '(absent)')[:12]} -> {is_now.get(file, '(absent)')[:12]}"
                for file in sorted({*was, *is_now})
                if was.get(file) != is_now.get(file)
            )
            raise InputError(
                f"{out}: its {name} ({now['path']}) has changed since it was begun ({differ}); use another --out"
            )
    for stage in needs:
        if directory.done(stage) is None:
            raise InputError(f"{out}: stage {stage} has not finished; run `heal {stage}` or `heal run` first")
    return directory
