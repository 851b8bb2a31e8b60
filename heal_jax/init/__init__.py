"""`heal init`: looks at model folders and problems, and writes a commented config that fits them."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from heal_jax.config import By, Config, EvaluateSpec, GradeSpec, ModelSpec, ProblemSpec, load, validate
from heal_jax.doctor import footprint, machine
from heal_jax.errors import InputError
from heal_jax.init.mapping import mapped
from heal_jax.init.template import text
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.lm import resolve
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import check as check_weights
from heal_jax.problems.grading import Grader
from heal_jax.problems.sources import Problem
from heal_jax.problems.sources import load as load_problems
from heal_jax.run import hindsight_question, hint_text, plain_question
from heal_jax.shapes import BUCKET, bucket

HELD_OUT = 5  # one in so many problems is held out, where no others are given
MOST_HELD_OUT = 500  # more of them move the interval little, and cost four models' samples
FEWEST = 10  # problems, of which some are held out
NEW_TOKENS, THINKING_TOKENS = 2048, 16384  # of a rollout: what solutions of school and contest mathematics take
EPOCHS = 5  # the paper's
LARGE = 1e9  # weights of a model that is kept in bfloat16
SHARE = 0.5  # of a device's memory, that weights and caches of rollouts may take: programs take more
STEPS = "Reason step by step, with an empty line between steps"
ASK = {
    "math": f"{STEPS}, and put your final answer within \\boxed{{}}.",
    "choice": f"{STEPS}, and put the letter of your answer within \\boxed{{}}.",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found, for the comments of the config."""

    teacher: DecoderConfig
    problems: int
    prompt: int  # tokens of the longest, with answer and hint
    unreadable: list[str]  # places of reference answers that math-verify cannot read
    notes: list[str]


def init(model: str, student: str | None, problems: str, held_out: str | None, out: Path) -> list[str]:
    """Write the config; what to say of it, line by line. Raises InputError, with nothing written, for what a run would
    refuse, and where `out` is there already.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: is there already; remove it, or give another --out")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {out}: a name that ends in .yaml is expected")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"--out {out}: cannot be written; name a file in a folder that is there")
    config, found = fitted(model, student or model, problems, held_out)
    validate(config)
    written = text(config, found, out)
    with open(out, "x", encoding="utf-8") as file:
        file.write(written)
    if load(out) != config:
        out.unlink()
        raise AssertionError(f"{out} does not read back as it was meant")
    split = "" if held_out else " (the last of the file; --held-out names others)"
    held = config.evaluate.problems.limit or "all"
    return [
        f"{out}: {found.problems} problems to train on, {held} held out{split}",
        *(f"note: {note}" for note in found.notes),
        f"next: heal doctor {out}",
        f"      heal run {out} --out runs/{out.stem}",
    ]


def fitted(model: str, student: str, problems: str, held_out: str | None) -> tuple[Config, Found]:
    """A config for these, and what was found on the way."""
    decoders, tokenizers = {}, {}
    for name in dict.fromkeys((model, student)):
        folder = resolve(ModelSpec(name))
        decoders[name] = decoder_config(folder)
        tokenizers[name] = Tokenizer(folder, decoders[name].vocab_size)
        check_weights(folder)
    notes = list[str]()
    spec, by = mapped(problems, notes)
    asked = load_problems(spec, by)
    if held_out is None:
        spec, test = _divided(spec, len(asked))
        asked = load_problems(spec, by)
    else:
        test, test_by = mapped(held_out, notes, split="test")
        if test_by != by:
            raise InputError(
                f"{held_out}: its answers are of another kind than those of {problems}; evaluate.by says so"
            )
        load_problems(test, by)
    grade, unreadable = _grading(by, asked)
    config = Config(
        teacher=ModelSpec(model, _dtype(decoders[model])),
        student=ModelSpec(student, _dtype(decoders[student])),
        problems=spec,
        grade=_thinking(grade, tokenizers[model]),
        evaluate=EvaluateSpec(problems=test),
    )
    if not model.startswith("builtin:"):  # the defaults are the built-in world's
        config = _told(config, len(asked))
    config, prompt = _lengths(config, decoders, tokenizers, asked)
    config = _batch(config, {"teacher": decoders[model], "student": decoders[student]}, notes)
    return config, Found(decoders[model], len(asked), prompt, unreadable, notes)


def _dtype(model: DecoderConfig) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if footprint.parameters(model) > LARGE else "float32"


def _divided(spec: ProblemSpec, count: int) -> tuple[ProblemSpec, ProblemSpec]:
    """Training problems and held-out ones, of one source."""
    if count < FEWEST:
        raise InputError(f"{spec.source}: {count} problems are too few to hold some out; give --held-out, or more")
    held = min(MOST_HELD_OUT, count // HELD_OUT)
    options = spec.options
    if spec.source.startswith(("tfds", "hf:")):  # `split` is a label there: the rows are those of the same split
        options = {**options, "split": spec.split}
    train = dataclasses.replace(spec, limit=count - held)
    return train, dataclasses.replace(spec, split="test", skip=count - held, limit=held, options=options)


def _grading(by: By, problems: list[Problem]) -> tuple[GradeSpec, list[str]]:
    """How answers are checked, and where math-verify cannot read a reference."""
    grade = GradeSpec(by=by)
    with Grader(grade) as grader:
        unreadable = [f"{problem.place} ({problem.answer[:40]!r})" for problem, _ in grader.unreadable(problems)]
    return (dataclasses.replace(grade, unreadable="text") if unreadable else grade), unreadable


def _thinking(grade: GradeSpec, teacher: Tokenizer) -> GradeSpec:
    """With the tags of a thinking model, where the teacher is one."""
    if not {"<think>", "</think>"} <= set(teacher.hf.get_vocab()):
        return grade
    opens = teacher.text(teacher.prompt("1 + 1 = ?")).rstrip().endswith("<think>")
    return dataclasses.replace(grade, think_end="</think>", think_open="" if opens else "<think>\n")


def _told(config: Config, problems: int) -> Config:
    """With prompts that say how to answer, and the paper's training."""
    said = ASK["choice" if config.grade.by == "choice" else "math"]
    sample = dataclasses.replace(config.sample, prompt=f"{{question}}\n\n{said}")
    hindsight = dataclasses.replace(config.hindsight, prompt=f"{{question}}\n\nThe final answer is {{answer}}. {said}")
    batch = 8
    # Of each problem about two examples: of stage 1, or of stages 2 and 3.
    steps = max(20, EPOCHS * 2 * problems // batch)
    train = dataclasses.replace(config.train, learning_rate=1e-5, batch=batch, steps=steps)
    return dataclasses.replace(config, sample=sample, hindsight=hindsight, train=train)


def _lengths(
    config: Config, decoders: dict[str, DecoderConfig], tokenizers: dict[str, Tokenizer], problems: list[Problem]
) -> tuple[Config, int]:
    """With room for rollouts as the models have positions for them; and the tokens of the longest prompt, with answer
    and hint."""
    model, student = config.teacher.path, config.student.path
    teacher = tokenizers[model]
    prompt = max(len(teacher.prompt(hindsight_question(config, p))) for p in problems)
    prompt += max(len(teacher.encode(hint_text(config, p))) for p in problems)
    own = max(len(tokenizers[student].prompt(plain_question(config, p))) for p in problems)
    wanted = THINKING_TOKENS if config.grade.think_end else NEW_TOKENS
    if model.startswith("builtin:"):
        wanted = config.sample.max_new_tokens
    room = min(decoders[model].max_positions - bucket(prompt), decoders[student].max_positions - bucket(own))
    new = min(wanted, room // BUCKET * BUCKET)
    if new < BUCKET:
        raise InputError(
            f"{model}: the longest prompt has {prompt} tokens with answer and hint, which leaves no room for a rollout "
            f"in {room + bucket(prompt)} positions; leave out long problems"
        )
    longest = bucket(own + new)
    train, pure = config.train, config.pure
    train = dataclasses.replace(
        train, max_tokens=max(train.max_tokens, longest), row_tokens=max(train.row_tokens, longest)
    )
    if new > NEW_TOKENS:
        train, pure = dataclasses.replace(train, remat="block"), dataclasses.replace(pure, batch=8)
    sample = dataclasses.replace(config.sample, max_new_tokens=new)
    return dataclasses.replace(config, sample=sample, train=train, pure=pure), prompt


def _batch(config: Config, models: dict[str, DecoderConfig], notes: list[str]) -> Config:
    """With as many rows, up to the default's, as this machine's memory has room for."""
    here, host = machine.devices(), machine.host_memory()
    if isinstance(here, str):
        notes.append(f"JAX finds no devices here ({here}): sample.batch is for one of unknown memory")
        here = {"count": 1, "memory": 0, "platform": ""}
    have = here["memory"] or (host[1] / here["count"] if host and here["platform"] == "cpu" else 0)
    mesh = {"data": here["count"], "fsdp": 1, "tensor": 1, "expert": 1}
    n = config.sample.n
    sizes = [rows for rows in range(config.sample.batch, n - 1, -n) if rows % here["count"] == 0] or [n * here["count"]]

    def fits(rows: int) -> bool:
        return not have or footprint.needs(with_batch(config, rows), models, mesh)[0].bytes < SHARE * have

    chosen = next(filter(fits, sizes), None)
    if chosen is None:
        notes.append("weights and caches may not fit this machine's memory; `heal doctor` says more")
    return with_batch(config, chosen or sizes[-1])


def with_batch(config: Config, rows: int) -> Config:
    """The same with another sample.batch."""
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, batch=rows))
