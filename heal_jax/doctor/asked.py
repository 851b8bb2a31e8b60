"""What a config asks for: models, tokenizers, problems, lengths, a mesh and its memory.

`found` is what earlier checks found: devices, models and tokenizers by name.
"""

import dataclasses
import string
from collections.abc import Iterator
from typing import Any

import numpy as np

from heal_jax.config import Config
from heal_jax.divide import require, sizes
from heal_jax.doctor import footprint, machine
from heal_jax.doctor.finding import OK, PROBLEM, WARNING, Finding, size
from heal_jax.errors import InputError, one_line
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.lm import resolve
from heal_jax.model.mesh import describe, mesh_shape
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import Source
from heal_jax.problems import hygiene
from heal_jax.problems.sources import Problem, at_hand, load
from heal_jax.run import hindsight_question, hint_text, plain_question
from heal_jax.sets import load_set
from heal_jax.shapes import positions
from heal_jax.world import model_folder

LETTERS = string.printable.replace("\x0b", "").replace("\x0c", "").replace("\r", "") + "éüßñ²√π∑≤≥×÷—’“”中א"


def models(config: Config, found: dict[str, Any]) -> Iterator[Finding]:
    """Teacher and student: family, sizes, tensors by name and shape."""
    found["models"] = {}
    for name, spec in (("teacher", config.teacher), ("student", config.student)):
        try:
            folder = resolve(spec)
            found["models"][name] = decoder = decoder_config(folder)
            Source(folder, decoder, np.dtype(np.float32)).complain()
        except InputError as error:
            yield Finding("models", PROBLEM, f"{name}: {one_line(error)}")
            continue
        weights = footprint.parameters(decoder) / 1e6
        shown = f"{weights / 1e3:.1f} B" if weights >= 1e3 else f"{weights:.1f} M"
        said = f"{name}: {spec.path}, {decoder.family}, {shown} parameters in {spec.dtype}, "
        yield Finding("models", OK, f"{said}{decoder.max_positions:,} positions, vocabulary {decoder.vocab_size:,}")


def tokenizers(config: Config, found: dict[str, Any]) -> Iterator[Finding]:
    """Chat template, EOS, think tags, and whether text comes back as it was."""
    found["tokenizers"] = {}
    for name, spec in (("teacher", config.teacher), ("student", config.student)):
        if name not in found.get("models", {}):
            continue
        try:
            tokenizer = Tokenizer(resolve(spec), found["models"][name].vocab_size)
            yield from of_tokenizer(config, name, tokenizer)
        except InputError as error:
            yield Finding("tokenizer", PROBLEM, f"{name}: {one_line(error)}")
            continue
        found["tokenizers"][name] = tokenizer


def of_tokenizer(config: Config, name: str, tokenizer: Tokenizer) -> Iterator[Finding]:
    """One tokenizer. Raises InputError where it cannot be used."""
    prompt = tokenizer.text(tokenizer.prompt(config.sample.prompt.replace("{question}", "1 + 1 = ?")))
    ends = ", ".join(repr(tokenizer.hf.convert_ids_to_tokens(i)) for i in tokenizer.eos_ids)
    if tokenizer.hf.chat_template is None:
        advice = "right for a base model; an instruction model needs its chat_template.jinja or tokenizer_config.json"
        yield Finding("tokenizer", WARNING, f"{name}: no chat template, prompts are the bare text; EOS {ends}", advice)
    else:
        yield Finding("tokenizer", OK, f"{name}: chat template, EOS {ends}")
    tag = config.grade.think_open.strip()
    if tag and prompt.rstrip().endswith(tag):
        text = f"{name}: its chat template opens the thinking part ({tag}) already"
        yield Finding("tokenizer", PROBLEM, text, "leave grade.think_open empty")
    if (end := "</think>") in tokenizer.hf.get_vocab() and not config.grade.think_end and name == "teacher":
        text = f"{name}: has the token {end}, and grade.think_end is empty: the thinking part counts as the answer"
        yield Finding(
            "tokenizer", WARNING, text, "set grade.think_end for a thinking model (README, 'Thinking models')"
        )
    yield from _round_trips(config, name, tokenizer)


def _round_trips(config: Config, name: str, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Whether text comes back as it was."""
    answer = f"{config.grade.answer_open}42{config.grade.answer_close}"
    if tokenizer.text(tokenizer.encode(answer)) != answer:
        text = f"{name}: {answer!r} does not come back as it was, so no answer is found"
        yield Finding("tokenizer", PROBLEM, text, "set grade.answer_open and answer_close to text that it can write")
    lost = "".join(dict.fromkeys(c for c in LETTERS if tokenizer.text(tokenizer.encode(f"a{c}a")) != f"a{c}a"))
    if lost and not str(tokenizer.folder).startswith(str(model_folder("teacher").parent)):  # which know few letters
        text = f"{name}: these do not come back as they were: {lost!r}"
        yield Finding("tokenizer", WARNING, text, "texts that hold them are dropped where the student has its own ids")


def problems(config: Config, found: dict[str, Any]) -> Iterator[Finding]:
    """Sources, what is left out of training, and lengths. Nothing is fetched."""
    several: dict[str, list[Problem]] = {}
    asked = {
        "problems": config.problems,
        **{f"held out {n}".rstrip(): s.problems for n, s in config.evaluate.all_sets.items()},
    }
    for name, spec in asked.items():
        if spec.source.startswith(("hf:", "tfds:")) and not at_hand(spec):
            yield Finding(
                "problems", WARNING, f"{spec.source} is not on this machine; a run fetches it", "see that it may"
            )
            return
        key = name.removeprefix("held out").strip()
        several[name] = load(spec, config.grade.by) if name == "problems" else load_set(config, key)
    held_out = [p for name, part in several.items() if name != "problems" for p in part]
    kept, removed = hygiene.clean(several["problems"], held_out, config.hygiene)
    counts = f"{len(kept)} to train on ({len(removed)} left out), {len(held_out)} held out"
    yield Finding("problems", OK, f"{config.problems.source}: {counts}")
    if len(held_out) < 30:
        advice = "an interval over so few is wide; some hundred are better"
        yield Finding("problems", WARNING, f"{len(held_out)} held-out problems", advice)
    for name, tokenizer in found.get("tokenizers", {}).items():
        yield lengths(config, name, tokenizer, found["models"][name], kept, held_out)


def lengths(
    config: Config, name: str, tokenizer: Tokenizer, model: DecoderConfig, kept: list[Problem], held_out: list[Problem]
) -> Finding:
    """Tokens of the longest prompt and of the longest rollout, against the positions of a model."""
    questions = [plain_question(config, p) for p in (*kept, *held_out)]
    if name == "teacher":
        questions += [hindsight_question(config, p) for p in kept]
    prompt = max(len(tokenizer.prompt(question)) for question in questions)
    hint = max(len(tokenizer.encode(hint_text(config, p))) for p in kept) if name == "teacher" else 0
    new = max(config.sample.max_new_tokens, *(one.max_new_tokens for one in config.evaluate.all_sets.values()))
    need, most = positions(prompt + hint, new), config.train.max_tokens
    said = f"{name}: prompts of {prompt} tokens at most, hints {hint}, {new} new ones: {need:,} positions"
    if need > model.max_positions:
        advice = "lower sample.max_new_tokens or leave out long problems"
        return Finding("lengths", PROBLEM, f"{said}, the model has {model.max_positions:,}", advice)
    if name == "student" and prompt + config.sample.max_new_tokens > most:
        advice = f"raise train.max_tokens to {prompt + config.sample.max_new_tokens} (and train.row_tokens)"
        return Finding("lengths", WARNING, f"{said}; examples over train.max_tokens {most} are left out", advice)
    return Finding("lengths", OK, f"{said} of {model.max_positions:,}")


def mesh(config: Config, found: dict[str, Any]) -> Iterator[Finding]:
    """Whether the devices can be arranged as asked, and hold what must be there."""
    here, both = found.get("devices"), found.get("models", {})
    if isinstance(here, str) or not here or len(both) < 2:
        return
    shape = mesh_shape(dataclasses.asdict(config.mesh), here["count"])
    require(shape, sizes(config, both))
    yield Finding("mesh", OK, f"{describe(shape)} divides models and batches")
    host = machine.host_memory()
    have = here["memory"] or (host[1] / here["count"] if host and here["platform"] == "cpu" else 0)
    for need in footprint.needs(config, both, shape):
        parts = ", ".join(f"{name} {size(part)}" for name, part in need.parts.items())
        text = f"{need.what}: at least {size(need.bytes)} a device ({parts})"
        if have and need.bytes > 0.9 * have:
            knobs = {
                "rollouts": "lower sample.batch, set sample.cache_tokens or sample.cache_dtype: int8",
                "training": "set train.lora.rank",
            }[need.what]
            advice = f"{knobs}, or split over more devices (mesh.fsdp, mesh.tensor)"
            yield Finding("memory", PROBLEM, f"{text}, there are {size(have)}", advice)
        else:
            yield Finding("memory", OK, f"{text}{f' of {size(have)}' if have else ''}; programs take more")
