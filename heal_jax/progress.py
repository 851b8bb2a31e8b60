"""What a command says while it works: to a person on stderr, and with --json-log to programs on stdout.

A person gets a live display on a terminal, plain lines elsewhere: no control characters, no colours. Programs get one
JSON object a line, each with `event` and `time` (ISO 8601, UTC):

| event | fields | when |
| --- | --- | --- |
| start | version, command | at the beginning |
| stage_start, stage_end | stage; seconds | around each stage of a run |
| progress | stage, done, total, unit, tokens, tokens_per_s, eta_seconds, counts | after each unit of work |
| note | text | what a person reads as a line that stays |
| result | figures of the command | a whole run: accuracy, difference, report, student; a plan; a bench |
| error | status, text | what ended the command badly |
| end | status, seconds | at the end in any case but a kill |

`stage` of a progress event may be a part of a stage: "train heal", "evaluate teacher". `tokens` are those of this unit;
tokens_per_s and eta_seconds are of the stage, null while they are not known: what was found on disk does not count, nor
the first unit once there is another, since it holds compiling. `counts` are of the stage so far: problems, rollouts,
samples, paths, grades {grade: number}, pass_rates (problems by pass rate: 0, 0.1 .. 1, rounded), strata {solved, hard,
unsolved}, pure {scored, passed} (right rollouts, and those at or below the threshold), repaired (problems with a right
repair that PURE passes), examples {stage: number}, hindsight and repair {problems, problems_kept, candidates, correct,
leaked, kept, duplicates}, phase, loss, learning_rate, grad_norm, mfu.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from heal_jax import __version__, display
from heal_jax.display import Standing
from heal_jax.storage import shown

EVERY = 10.0  # seconds between plain lines
LOSSES = 16  # of a training that are drawn


class Progress:
    """`progress.update("sample", 3, 30, "shards", tokens=4000, counts={"rollouts": 360})`.

    quiet: nothing for a person. json_log: events for programs on stdout; where that is a terminal, they take the
    display's place.
    """

    def __init__(
        self,
        console: Console | None = None,
        quiet: bool = False,
        json_log: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        quiet = quiet or (json_log and sys.stdout.isatty())
        self.console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self.json_log, self._now, self._began = json_log, now, now()
        # FORCE_COLOR makes rich take any file for a terminal: what moves the cursor is for real ones.
        self._on_terminal = self.console.file.isatty() and not self.console.is_dumb_terminal
        self._plain = not self.console.encoding.lower().startswith("utf")
        self._live: Live | None = None
        self._spinner = Spinner("line" if self._plain else "dots")
        self._command = ""
        self._stage = self._doing = ""  # a stage of a run, and what it is at
        self._standing: Standing | None = None
        self._rate = _Rate(now())
        self._updated = self._said = self._began_at = -math.inf

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live display away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def mute(self) -> None:
        """Say no more: another process of the job speaks."""
        self.close()
        self.console.quiet, self.json_log = True, False

    def start(self, command: str) -> None:
        """The first event, which comes with the second: by then it is known which process of several speaks."""
        self._command = command

    def end(self, status: int, error: str = "") -> None:
        """The command is over. error: why, where it ended badly; who calls prints it."""
        self.close()
        if error:
            self.log("error", status=status, text=error)
        self.log("end", status=status, seconds=round(self._now() - self._began, 3))

    @property
    def printer(self) -> Console:
        """Where a command prints what it found: stdout, unless that is for programs."""
        return self.console if self.json_log else Console(highlight=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, a stage of a run is at work."""
        began = self._now()
        self.log("stage_start", stage=name)
        self.at(name)
        yield
        self._stage, self._doing, self._standing = "", "", None
        self.log("stage_end", stage=name, seconds=round(self._now() - began, 3))

    def at(self, name: str, doing: str = "") -> None:
        """From now on this is at work, of which nothing is there yet."""
        self._stage, self._doing, self._standing, self._began_at = name, doing or "starting", None, self._now()
        self._show()

    def doing(self, what: str) -> None:
        """What the unit is at, on the live display alone."""
        self._doing = what

    def update(
        self,
        stage: str,
        done: int,
        total: int,
        unit: str = "",
        *,
        tokens: int = 0,
        found: bool = False,
        counts: Mapping[str, Any] | None = None,
    ) -> None:
        """`done` of `total` units of a stage are there; the last made `tokens`, or was `found` on disk. The first
        update of a stage says where it begins."""
        now, before = self._now(), self._standing
        if before is None or before.stage != stage or done < before.done:
            began = self._began_at if self._stage == stage else now
            before, self._rate, self._said = None, _Rate(began), -math.inf
        units = done - before.done if before else 0
        self._rate.add(now, units, tokens, found)
        loss = (counts or {}).get("loss")
        losses = [*(before.losses if before else ()), *([loss] if loss is not None else [])][-LOSSES:]
        left, per_second = self._rate.seconds_a_unit, self._rate.tokens_a_second
        eta = None if left is None else round(left * (total - done), 1)
        seconds = now - self._rate.began
        standing = Standing(stage, done, total, unit, tokens, per_second, eta, counts or {}, losses, seconds)
        self._standing, self._updated, self._doing = standing, now, ""
        event = {field.name: getattr(standing, field.name) for field in dataclasses.fields(Standing)}
        del event["losses"], event["seconds"]
        self.log("progress", **event)
        finished = done >= total and (before is None or before.done < total)
        if self._on_terminal:
            if finished:
                self.console.print(display.lasting(standing, self.console.width, self._plain), soft_wrap=True)
            self._show()
        elif (finished or now - self._said >= EVERY) and (before or finished):
            self.console.print(display.line(standing, self._plain).plain, markup=False, soft_wrap=True)
            self._said = now

    def say(self, text: str) -> None:
        """A line that stays."""
        text = shown(text)
        self.log("note", text=text)
        self.console.print(text, markup=False, soft_wrap=True)

    def log(self, event: str, **values: Any) -> None:
        """A line for programs. One that cannot be written is the last, and ends nothing."""
        if not self.json_log:
            return
        if self._command:
            command, self._command = self._command, ""
            self.log("start", version=__version__, command=command)
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        try:
            print(json.dumps(_finite(line)), flush=True)
        except (OSError, ValueError) as error:
            self.json_log = False
            with contextlib.suppress(OSError, ValueError):  # nor is the flush at the end to fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.say(f"note: stdout cannot be written ({error}); no more JSON lines")

    def _show(self) -> None:
        """Have the live display, where there is a terminal for it and something at work."""
        if not self._on_terminal or self.console.quiet or self._live is not None:
            return
        # What libraries print on a stdout that goes elsewhere must go there.
        own = {"redirect_stdout": sys.stdout.isatty(), "transient": True, "refresh_per_second": 8}
        self._live = Live(console=self.console, get_renderable=self._block, **own)  # type: ignore[arg-type]
        self._live.start()

    def _block(self) -> Any:
        """Called by the display's own thread."""
        standing, waited = self._standing, self._now() - self._updated
        if standing is not None and standing.done >= standing.total:
            return display.block(
                None, self._stage or standing.stage, self._doing or "finishing", 0.0, 80, self._spinner
            )
        if standing is None and not self._stage:
            return ""
        return display.block(standing, self._stage, self._doing, waited, self.console.width, self._spinner)


class _Rate:
    """Seconds a unit and tokens a second of a stage, from what was made now."""

    def __init__(self, began: float):
        self.began = self._last = began
        self._first = self._rest = (0, 0, 0.0)  # units, tokens, seconds

    def add(self, now: float, units: int, tokens: int, found: bool) -> None:
        if units > 0 and not found:
            made = units, tokens, now - self._last
            if not self._first[0]:
                self._first = made
            else:
                self._rest = tuple(a + b for a, b in zip(self._rest, made))  # type: ignore[assignment]
        self._last = now

    @property
    def _counted(self) -> tuple[int, int, float]:
        """The first unit holds compiling: it counts only as long as it is the only one."""
        return self._rest if self._rest[0] else self._first

    @property
    def seconds_a_unit(self) -> float | None:
        units, _, seconds = self._counted
        return seconds / units if units else None

    @property
    def tokens_a_second(self) -> float | None:
        _, tokens, seconds = self._counted
        return round(tokens / seconds, 1) if tokens and seconds > 0 else None


def _finite(value: Any) -> Any:
    """JSON data: NumPy's numbers as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
