"""`heal doctor`: what a run needs, looked at one by one, and what to do where something is missing."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import string
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heal_jax import cache, footprint, machine, processes, storage
from heal_jax.config import Config
from heal_jax.divide import require, sizes
from heal_jax.errors import InputError, one_line
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.lm import resolve
from heal_jax.model.mesh import describe, mesh_shape
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import Source
from heal_jax.problems import hygiene
from heal_jax.problems.sources import Problem, at_hand, load
from heal_jax.run import FREE_BYTES, hindsight_question, hint_text, plain_question
from heal_jax.sets import load_set
from heal_jax.shapes import positions
from heal_jax.world import model_folder

OK, WARNING, PROBLEM = "ok", "warning", "problem"
COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}
# What an extra is for, by the module that it brings.
EXTRAS = {
    "datasets": ("hf", "hf: problem sources"),
    "gguf": ("models", "heal fetch-model"),
    "libtpu": ("plan", "heal plan with the TPU's compiler"),
    "tensorboardX": ("tensorboard", "log.to: [tensorboard]"),
    "hypothesis": ("fuzz", "heal bench fuzz"),
    "lm_eval": ("eval", "EleutherAI's lm-eval on the student"),
}
LETTERS = string.printable.replace("\x0b", "").replace("\x0c", "").replace("\r", "") + "éüßñ²√π∑≤≥×÷—’“”中א"


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: ok, warning (it may go wrong), problem (it will). advice: what to do, where there is something."""

    topic: str
    level: str
    text: str
    advice: str = ""


def examine(config: Config | None, out: Path) -> Iterator[Finding]:
    """Look at everything; with a config, at what it asks for, too. A check that fails itself is a finding."""
    found: dict[str, Any] = {}

    def devices() -> Iterator[Finding]:
        found["devices"] = machine.devices()
        yield from of_devices(found["devices"], machine.accelerators(), os.environ.get("JAX_PLATFORMS", ""))

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", packages),
        ("extras", lambda: extras(config)),
        ("devices", devices),
        ("memory", memory),
        ("processes", lambda: of_processes(os.environ)),
        ("cache", compile_cache),
        ("disk", lambda: disk(out, config)),
    ]
    if config is not None:
        checks += [
            ("models", lambda: models(config, found)),
            ("tokenizer", lambda: tokenizers(config, found)),
            ("problems", lambda: problems(config, found)),
            ("mesh", lambda: mesh(config, found)),
        ]
    for topic, check in checks:
        try:
            yield from check()
        except InputError as error:
            yield Finding(topic, PROBLEM, one_line(error))
        except Exception as error:  # a doctor comes to the end of the list
            yield Finding(topic, WARNING, f"could not be looked at ({type(error).__name__}: {one_line(error)[:200]})")


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line a finding, its advice below."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for f in findings:
        advice = Text.assemble("\n", ("→ " if console.encoding.startswith("utf") else "-> ") + f.advice)
        text = Text.assemble(f.text, advice if f.advice else "")
        grid.add_row(Text(f.level, COLOURS[f.level]), Text(f.topic, "bold"), text)
    console.print(grid)
    counts = {level: sum(f.level == level for f in findings) for level in (PROBLEM, WARNING)}
    said = (f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts.items())
    console.print(f"\n{', '.join(said)}", markup=False)


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def packages() -> Iterator[Finding]:
    """Python and what pyproject.toml asks for, against what is installed."""
    yield Finding(
        "packages", OK, f"Python {platform.python_version()}, heal-jax {importlib.metadata.version('heal-jax')}"
    )
    asked = [Requirement(line) for line in _asked_for()]
    needed = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        have = _version(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement.name} {have or 'missing'} (asked for: {requirement.specifier})")
    if wrong:
        advice = "pip install --upgrade heal-jax, in an environment of its own"
        yield Finding("packages", PROBLEM, "; ".join(wrong), advice)
    else:
        named = ", ".join(f"{name} {_version(name)}" for name in ("jax", "flax", "transformers"))
        yield Finding("packages", OK, f"all {len(needed)} are of versions that were asked for: {named}, ...")
    if (jax := _version("jax")) and (lib := _version("jaxlib")) and jax.split(".")[:2] != lib.split(".")[:2]:
        yield Finding("packages", PROBLEM, f"jax {jax} with jaxlib {lib}", f"pip install jaxlib=={jax}")


def _asked_for() -> list[str]:
    """What heal-jax depends on: of a clone as pyproject.toml says now, which may be after it was installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return importlib.metadata.requires("heal-jax") or []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras(config: Config | None) -> Iterator[Finding]:
    """Packages that only some of it needs."""
    missing = [module for module in EXTRAS if importlib.util.find_spec(module) is None]
    wanted = set()
    if config is not None:
        sources = [config.problems, *(one.problems for one in config.evaluate.all_sets.values())]
        wanted |= {"datasets"} if any(s.source.startswith("hf:") for s in sources) else set()
        trackers = {"tensorboard": "tensorboardX"}
        wanted |= {trackers.get(name, name) for name in config.log.to}
        missing += [name for name in ("wandb", "trackio") if name in wanted and importlib.util.find_spec(name) is None]
    for module in missing:
        extra, use = EXTRAS.get(module, ("", f"log.to: [{module}]"))
        advice = f"pip install 'heal-jax[{extra}]'" if extra else f"pip install {module}"
        if module in wanted:
            yield Finding("extras", PROBLEM, f"{module} is missing, and the config needs it: {use}", advice)
        else:
            yield Finding("extras", OK, f"{module} is not installed; only for {use}: {advice}")
    if not missing:
        yield Finding("extras", OK, f"all are there: {', '.join(EXTRAS)}")


def of_devices(found: dict[str, Any] | str, there: str, asked: str) -> Iterator[Finding]:
    """What JAX found, beside what the system has (tpu, gpu or nothing) and JAX_PLATFORMS."""
    holders = machine.tpu_holders() if there == "tpu" or machine.TPU_LOCK.exists() else []
    lock = machine.locked()
    if holders or lock == "held":
        who = "; ".join(f"process {number}: {command}" for number, command in holders) or "another process"
        advice = "end that process, or wait for it; a TPU belongs to one process of a host"
        level = PROBLEM if there == "tpu" else WARNING
        yield Finding("devices", level, f"the TPU is held by {who}", advice)
    elif lock == "foreign":
        yield Finding(
            "devices", WARNING, f"{machine.TPU_LOCK} belongs to another user", f"sudo rm -f {machine.TPU_LOCK}"
        )
    if isinstance(found, str):
        advice = "on a pod, start all hosts together with HEAL_COORDINATOR=auto; else see what JAX_PLATFORMS names"
        yield Finding("devices", PROBLEM, f"JAX finds none: {found}", advice)
        return
    kind = found["kind"] if found["kind"] != found["platform"] else ""
    told = ", ".join(filter(None, (kind, f"{size(found['memory'])} each" if found["memory"] else "")))
    several = "" if found["count"] == 1 else "s"
    text = f"{found['count']} {found['platform']} device{several}{f' ({told})' if told else ''}"
    if there and found["platform"] == "cpu":
        advice = "unset JAX_PLATFORMS to use it" if "cpu" in asked else f"pip install 'heal-jax[{there}]'"
        yield Finding("devices", WARNING, f"{text}, although this machine has a {there.upper()}", advice)
    else:
        yield Finding("devices", OK, text)
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        text = "XLA_FLAGS makes several devices of one CPU: for tests, slower than one"
        yield Finding("devices", WARNING, text, "unset XLA_FLAGS")


def memory() -> Iterator[Finding]:
    """Of the host."""
    found = machine.host_memory()
    if found is None:
        yield Finding("memory", OK, "the system does not say how much the host has")
        return
    total, free = found
    text = f"{size(free)} of the host's {size(total)} are available"
    if free < 2e9:
        yield Finding("memory", WARNING, text, "end other programs: the built-in run alone takes 1.4 GB")
    else:
        yield Finding("memory", OK, text)


def of_processes(environment: Any) -> Iterator[Finding]:
    """The variables that join several processes."""
    arguments = processes.named(environment)
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if arguments is None and len(hosts) > 1:
        text = f"this is one of {len(hosts)} hosts of a pod, and HEAL_COORDINATOR is not set"
        yield Finding("processes", PROBLEM, text, "on every host: export HEAL_COORDINATOR=auto, then the same command")
    elif arguments is None:
        yield Finding("processes", OK, "one process does a run (HEAL_COORDINATOR is not set)")
    elif not arguments:
        yield Finding("processes", OK, "HEAL_COORDINATOR=auto: JAX finds the others")
    else:
        text = "process {process_id} of {num_processes}, joined at {coordinator_address}".format_map(arguments)
        yield Finding("processes", OK, text)
    if nproc := environment.get("NPROC"):
        yield Finding("processes", OK, f"NPROC={nproc} threads (part of what fixes the bytes)")


def compile_cache() -> Iterator[Finding]:
    """Where compiled programs are kept."""
    wanted = os.environ.get("HEAL_COMPILATION_CACHE") or "on"
    if wanted not in ("on", "off"):
        advice = "set it to on or off"
        yield Finding("cache", PROBLEM, f"HEAL_COMPILATION_CACHE={wanted}", advice)
    elif wanted == "off":
        advice = "unset HEAL_COMPILATION_CACHE to keep programs"
        yield Finding("cache", WARNING, "every run compiles anew (HEAL_COMPILATION_CACHE=off)", advice)
    elif other := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield on_bucket("cache", other) or Finding("cache", OK, f"{other} (JAX_COMPILATION_CACHE_DIR; JAX's affair)")
    elif wrong := cache.unusable(cache.folder(), make=False):
        advice = "make it yours alone (chmod go-w), or set XDG_CACHE_HOME to a folder that is"
        yield Finding("cache", WARNING, f"{cache.folder()}: {wrong}; every run compiles anew", advice)
    else:
        held = sum(entry.stat().st_size for entry in cache.folder().glob("*-cache")) if cache.folder().is_dir() else 0
        yield Finding("cache", OK, f"{cache.folder()}: {size(held)} of {size(cache.MAX_BYTES)}")


def on_bucket(name: str, path: str | Path) -> Finding | None:
    """Whether a path on a bucket can be written; None for one on disk."""
    try:
        if (url := storage.address(path)) is None:
            return None
        storage.require(url)
    except InputError as error:
        text, _, advice = str(error).rpartition("; ")
        return Finding(name, PROBLEM, text or advice, advice)
    return Finding(name, OK, f"{url} can be written")


def disk(out: Path, config: Config | None) -> Iterator[Finding]:
    """Room where the run directory and the cache are."""
    needed = float(FREE_BYTES)
    if config is not None:
        with contextlib.suppress(InputError):  # said of the models
            student = decoder_config(resolve(config.student))
            # Both students' last two checkpoints, and the exported weights.
            needed += 4 * footprint.checkpoint_bytes(config, student) + 4.0 * footprint.parameters(student)
    if finding := on_bucket("disk", out):
        yield finding
        return
    for what, place, least in ((f"{out}", out, needed), ("the cache", cache.folder(), cache.MAX_BYTES / 4)):
        parent = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        text = f"{size(free)} are free for {what}"
        if not os.access(parent, os.W_OK):
            yield Finding("disk", PROBLEM, f"{parent} cannot be written, for {what}", "name another folder")
        elif free < least:
            level = PROBLEM if place == out else WARNING
            yield Finding("disk", level, f"{text}, about {size(least)} are wanted", "make room, or name another")
        else:
            yield Finding("disk", OK, f"{text} (about {size(least)} are wanted)")


def models(config: Config, found: dict[str, Any]) -> Iterator[Finding]:
    """Teacher and student: family, sizes, tensors by name and shape."""
    found["models"] = {}
    for name, spec in (("teacher", config.teacher), ("student", config.student)):
        try:
            folder = resolve(spec)
            found["models"][name] = decoder = decoder_config(folder)
            import numpy as np

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
