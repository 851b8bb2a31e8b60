"""What a run needs of this machine: packages, devices, memory, processes, cache, disk."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from heal_jax import cache, processes, storage
from heal_jax.config import Config
from heal_jax.doctor import footprint, machine
from heal_jax.doctor.finding import OK, PROBLEM, WARNING, Finding, size
from heal_jax.errors import InputError
from heal_jax.model.config import decoder_config
from heal_jax.model.lm import resolve
from heal_jax.run import FREE_BYTES

# What an extra is for, by the module that it brings.
EXTRAS = {
    "datasets": ("hf", "hf: problem sources"),
    "gguf": ("models", "heal fetch-model"),
    "libtpu": ("plan", "heal plan with the TPU's compiler"),
    "tensorboardX": ("tensorboard", "log.to: [tensorboard]"),
    "hypothesis": ("fuzz", "heal bench fuzz"),
    "lm_eval": ("eval", "EleutherAI's lm-eval on the student"),
}


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
    project = Path(__file__).parents[2] / "pyproject.toml"
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
        # os.path's is False where a path may not be seen; pathlib's raises.
        parent = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.exists(p))
        free = shutil.disk_usage(parent).free
        text = f"{size(free)} are free for {what}"
        if not os.access(parent, os.W_OK):
            yield Finding("disk", PROBLEM, f"{parent} cannot be written, for {what}", "name another folder")
        elif free < least:
            level = PROBLEM if place == out else WARNING
            yield Finding("disk", level, f"{text}, about {size(least)} are wanted", "make room, or name another")
        else:
            yield Finding("disk", OK, f"{text} (about {size(least)} are wanted)")
