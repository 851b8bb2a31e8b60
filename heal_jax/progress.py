"""What a long stage says while it works: a live line on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

EVERY = 10.0  # seconds between plain lines


class Progress:
    """`with Progress() as progress: progress.update("sample", 3, 30, "0.54 correct", tokens=4000)`."""

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._stage = ""
        self._start = self._said = 0.0
        self._first = self._tokens = 0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, stage: str, done: int, total: int, note: str = "", tokens: int = 0) -> None:
        """`done` of `total` units of a stage are there; `tokens` were made by this unit."""
        now = time.monotonic()
        if stage != self._stage:
            # The first unit holds compilation: rate and time left are measured after it.
            self._stage, self._start, self._said, self._first, self._tokens = stage, now, 0.0, done, 0
        self._tokens += tokens if done > self._first else 0
        parts = [f"{stage:<10} {done}/{total}"]
        if done > self._first:
            elapsed = now - self._start
            if self._tokens:
                parts.append(f"{self._tokens / elapsed:,.0f} tokens/s")
            parts.append(f"{elapsed * (total - done) / (done - self._first):.0f} s left")
        line = "  ".join([*parts, note]).rstrip()
        if self.console.is_terminal:
            self._live.update(Text(line))
        elif now - self._said >= EVERY:
            self.console.print(line, markup=False, soft_wrap=True)
            self._said = now

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)
