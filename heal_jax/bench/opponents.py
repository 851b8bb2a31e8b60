"""The other tools: found, started, asked."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from heal_jax.bench.machine import threads

TUNIX = "HEAL_TUNIX_PYTHON"
INSTALL = {
    "torch": "not installed: pip install torch==2.13.0",
    "tunix": "not installed: pip install google-tunix==0.1.7 in an environment of its own, and name its python with "
    f"--tunix-python or {TUNIX}",
}


class Absent(Exception):
    """A tool that cannot be measured; one line says why."""


class Peer:
    """A tool in a process of its own (`heal_jax.bench.peer`). Raises Absent where it is not installed or fails."""

    def __init__(self, tool: str, python: str | None, folder: Path):
        self.tool = tool
        if python is None:
            raise Absent(f"{tool}: {INSTALL[tool]}")
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads()), "TOKENIZERS_PARALLELISM": "false"}
        # Not in this folder's name space: the other Python may be without heal_jax, or have another one.
        command = [python, str(Path(__file__).with_name("peer.py")), tool, str(folder), str(threads())]
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
            )
        except OSError as error:
            raise Absent(f"{tool}: {python} cannot be started ({error.strerror})") from None
        self.versions: dict[str, str] = self._read()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One repeat. Raises Absent where it fails."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: _read says why
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise Absent(f"{self.tool}: failed: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or [f"status {self.process.returncode}"])[-1]
        why = INSTALL[self.tool] if last.startswith("ModuleNotFoundError") else f"failed: {last[:200]}"
        raise Absent(f"{self.tool}: {why}")

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()
