"""What every measurement is given."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from heal_jax.bench.machine import Products
from heal_jax.bench.opponents import TUNIX, Absent, Peer
from heal_jax.bench.timing import Side, take_turns
from heal_jax.model.lm import LanguageModel


@dataclasses.dataclass
class Bench:
    """The model, how often, whom to compare with; notes gathers what the reader must know."""

    lm: LanguageModel
    quick: bool
    repeats: int
    tunix_python: str | None
    say: Callable[[str], None]
    notes: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.products = Products(self.lm.model)
        self._peers: dict[str, Peer | None] = {}
        self._asked: list[Side] = []

    def tokens(self, rows: int, length: int) -> np.ndarray:
        """Random ids [rows, length] int32, the same every time; ids below 16, often special, are left out."""
        vocab = self.lm.model.config.vocab_size
        return np.random.default_rng(0).integers(min(16, vocab - 1), vocab, (rows, length), dtype=np.int32)

    def peer(self, tool: str) -> Peer | None:
        """The other tool's process, started when first asked for; None, and a note, where it cannot be."""
        if tool not in self._peers:
            try:
                peer = Peer(tool, self._python(tool), self.lm.folder)
                self._peers[tool], self.versions = peer, self.versions | peer.versions
            except Absent as absent:
                self._peers[tool] = None
                self.note(str(absent))
        return self._peers[tool]

    def _python(self, tool: str) -> str | None:
        own = sys.executable if importlib.util.find_spec(tool) else None
        return own if tool == "torch" else self.tunix_python or os.environ.get(TUNIX) or own

    def asking(self, tool: str, do: str, **request: Any) -> Side | None:
        """A side that is one repeat of another tool, after a first that shows whether it can; None where not."""
        peer = self.peer(tool)
        if peer is None:
            return None
        try:
            answer = peer.ask(do, **request)
        except Absent as absent:
            self.note(f"{absent} ({do})")
            return None
        wanted = [len(request["prompts"]), request["new"]] if do == "decode" else None
        if answer.get("shape") != wanted:
            self.note(f"{tool}: made {answer.get('shape')} tokens, not {wanted}: not the same work, left out")
            return None

        def side() -> float:
            return peer.ask(do, **request)["seconds"]

        self._asked.append(side)
        return side

    def turns(self, sides: dict[str, Side | None], *, warm: bool = False) -> dict[str, tuple[float, ...]]:
        """Seconds of the sides that are there; warm: all were run before."""
        there = {name: side for name, side in sides.items() if side is not None}
        return take_turns(there, self.repeats, list(there.values()) if warm else self._asked)

    def note(self, text: str) -> None:
        """For the end of the output, and at once."""
        self.notes.append(text)
        self.say(text)

    def close(self) -> None:
        """End the other tools."""
        for peer in self._peers.values():
            if peer is not None:
                peer.close()
        self._peers.clear()
