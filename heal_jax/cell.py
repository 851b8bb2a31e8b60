"""Progress in the output of a notebook's cell."""

import io
from typing import Any

import absl.logging
from rich.console import Console


def cell_console(quiet: bool = False) -> Console | None:
    """Where progress goes in a notebook, the cell's output, without warnings of libraries. None elsewhere."""
    if not Console().is_jupyter:
        return None
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns where a disk is slow
    return Console(file=Cell(), force_jupyter=False, force_terminal=False, highlight=False, quiet=quiet)


class Cell(io.StringIO):
    """A file that writes into the output of a notebook's cell. A stage's line takes the place of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._shown: Any = None

    def write(self, text: str) -> int:
        for line in filter(None, text.splitlines()):
            same = self.lines and self.lines[-1][:11] == line[:11] and not line.startswith("note")
            self.lines[-1 if same else len(self.lines) :] = [line]
        from IPython.display import display

        data = {"text/plain": "\n".join(self.lines)}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True)
        else:
            self._shown.update(data, raw=True)
        return len(text)
