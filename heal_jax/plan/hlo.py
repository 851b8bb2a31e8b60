"""The text of an optimised HLO module, as far as costs need it: computations, instructions, types, loops.

A private format of XLA's; what is not understood raises ValueError rather than count as nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_WIDTH = {"pred": 1, "bf16": 2, "token": 0, "s4": 0.5, "u4": 0.5}  # others end in their bits


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type: width in bytes, dims, whether it lies in HBM."""

    width: float
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> float:
        return self.width * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`; `inner` is the text between the parentheses."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inner: str
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its type, those of a tuple in order."""
        return tuple(_arrays(self.type))

    def called(self, *names: str) -> list[str]:
        """Computations named by these attributes."""
        found = [re.search(rf"\b{name}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes) for name in names]
        return [name for match in found if match for name in re.findall(r"%([\w.\-]+)", match[1])]


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names of its parameters, in order."""
        numbered = {int(i.inner): i.name for i in self.instructions.values() if i.opcode == "parameter"}
        return [numbered[n] for n in sorted(numbered)]


def _arrays(text: str) -> Iterator[Array]:
    for kind, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?", text):
        bits = re.match(r"[a-z]+(\d+)", kind)
        width = _WIDTH.get(kind, int(bits[1]) / 8 if bits else 0)
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(width, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), space is None or space[1] == "0")


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"HLO text: no closing parenthesis in {text[:80]!r}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO module's text by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    current: dict[str, Instruction] | None = None
    text = re.sub(r'\{\n("[^\n]*)\n\}', r"{\1}", text)  # a kernel's metadata has lines of its own
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                name, current, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name], current = Computation(current, root), None
        else:
            found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
            if found:
                instruction = _instruction(found[2], line[found.end() :])
                current[instruction.name] = instruction
                root = instruction.name if found[1] else root
    if not entry:
        raise ValueError("HLO text: no entry computation")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not opcode:
        raise ValueError(f"HLO text: no operation in {rest[:120]!r}")
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(name, rest[:end], opcode[1], operands, inner, rest[stop + 1 :])


def trip_count(loop: Instruction, outer: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a `while` runs: XLA's own note, or a counter from 0 compared with a constant; None: data decide."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = computations[loop.called("condition")[0]]
    body = computations[loop.called("body")[0]]
    test = condition.instructions[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (_loop_value(name, loop, condition, body, outer) for name in test.operands)
    return bound if counter == "counter" and isinstance(bound, int) else None


def _loop_value(
    name: str, loop: Instruction, condition: Computation, body: Computation, outer: Computation
) -> int | str | None:
    """A value that the condition compares: a constant, "counter" (from 0, changed by the body), None: neither."""
    value = condition.instructions[name]
    if value.opcode == "constant":
        return int(value.inner) if re.fullmatch(r"-?\d+", value.inner) else None
    index = re.search(r"index=(\d+)", value.attributes)
    if value.opcode != "get-tuple-element" or not index:
        return None
    n = int(index[1])
    start = outer.instructions[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    first = outer.instructions[start.operands[n]]
    while first.opcode in ("copy", "bitcast"):
        first = outer.instructions[first.operands[0]]
    constant = int(first.inner) if first.opcode == "constant" and first.inner.isdigit() else None
    last = body.instructions[body.root]
    same = False
    if last.opcode == "tuple":
        kept = body.instructions[last.operands[n]]
        same = kept.opcode == "get-tuple-element" and re.search(rf"index={n}\b", kept.attributes) is not None
    return constant if same else ("counter" if constant == 0 else None)
