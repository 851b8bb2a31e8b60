"""What one execution of a compiled program does on one chip, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count; this counts it as often as it runs.

- FLOPs: matrix products alone (`dot`, and `convolution`, which the TPU compiler makes of them), 2 a multiply-add, as
  the compiler left them: what is computed twice (rematerialised, or replicated over chips) counts twice. A product
  with a single row becomes a multiplication and a sum, which is not counted.
  Splash attention's kernels count the products of the blocks that they do not skip.
- Bytes: read from and written to HBM by each instruction that the compiler schedules: its operands and results, less
  what it put in on-chip memory (a memory space S(n) in the layout). Slices, gathers and updates in place count what
  they touch. A fusion is one instruction: what happens inside never leaves the chip. Collectives count as if each
  element were read and written once.
- Collectives: by kind, how many and the bytes that one chip contributes or receives, whichever is more; `wire` is
  what passes one chip's links in a ring of links that go both ways.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator

from heal_jax.plan.hlo import Array, Computation, Instruction, parse, trip_count
from heal_jax.rollout.decode import READS, STEPS, TURNS

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_NO_TRAFFIC |= {"replica-id", "opt-barrier", "async-update", "domain"}
# Custom calls that compute: Pallas kernels, and other compilers' libraries. The TPU compiler's own move data.
_COMPUTES = re.compile(r"tpu_custom_call$|__|Mosaic")
# Splash attention: how many products of a block of queries with one of keys each of its kernels makes.
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)_")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_VIEWS = {"ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound"}  # of the others, those that touch nothing


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and bytes as defined above; `collectives` counts {kind: number}, `payload` {kind: bytes}; `wire` bytes.

    `uncounted` {target: number}: custom calls whose FLOPs are not known.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wire: float = 0.0
    collectives: Counter[str] = dataclasses.field(default_factory=Counter)
    payload: Counter[str] = dataclasses.field(default_factory=Counter)
    uncounted: Counter[str] = dataclasses.field(default_factory=Counter)

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """self + times * other."""

        def sum_(a: Counter[str], b: Counter[str]) -> Counter[str]:
            return Counter({key: a[key] + times * b[key] for key in {**a, **b}})

        return Cost(
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            self.wire + times * other.wire,
            *(sum_(getattr(self, name), getattr(other, name)) for name in ("collectives", "payload", "uncounted")),
        )


class Compiled:
    """A compiled program's text, parsed. `slots`: of the caches that its decode loop carries.

    Loops whose trip counts the data decide are told by the names they were traced with. The body of one without such a
    name is counted once, and that is told in `Cost.uncounted`.
    """

    def __init__(self, text: str, slots: Collection[int] = ()):
        self.computations, self.entry = parse(text)
        self.slots = slots
        partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        self.chips = int(partitions[1]) if partitions else 1

    def cost(self, steps: float = 0, reads: float = 0) -> Cost:
        """One execution, with so many decode steps and reads of contexts in all."""
        # What is outside these two loops but inside the loop over turns is next to nothing.
        trips = {STEPS: steps, READS: reads, TURNS: 1}
        memo: dict[str, Cost] = {}

        def whole(name: str) -> Cost:
            if name not in memo:
                total = Cost()
                computation = self.computations[name]
                for instruction in computation.instructions.values():
                    total = total.plus(of(instruction, computation))
                memo[name] = total
            return memo[name]

        def of(instruction: Instruction, computation: Computation) -> Cost:
            opcode = instruction.opcode
            if opcode == "while":
                known = trip_count(instruction, computation, self.computations)
                count = trips.get(_loop_name(instruction)) if known is None else known
                inside = whole(instruction.called("body")[0]).plus(whole(instruction.called("condition")[0]))
                if count is None:
                    return inside.plus(Cost(uncounted=Counter({"while (data decide how often)": 1})))
                return Cost().plus(inside, count)
            if opcode == "conditional":
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                return max((whole(name) for name in branches), key=lambda cost: (cost.flops, cost.bytes))
            if opcode == "call" or opcode == "async-start":
                names = instruction.called("to_apply", "calls", "called_computations")
                return functools.reduce(Cost.plus, (whole(name) for name in names), Cost())
            return self._cost(instruction, computation)

        return whole(self.entry)

    def _cost(self, instruction: Instruction, computation: Computation) -> Cost:
        """An instruction that is neither loop nor call."""
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
            return Cost()
        flops, bytes_, collective = self._flops(instruction, computation), 0.0, Cost()
        uncounted: Counter[str] = Counter()
        if opcode == "fusion":
            inner = self.computations[instruction.called("calls")[0]]
            flops, collective, uncounted = self._inside(instruction.called("calls")[0])
            bytes_ = self._fusion_bytes(instruction, inner, computation, bool(collective.collectives))
        elif (kind := opcode.removesuffix("-start")) in _COLLECTIVES:
            operands = self._operands(instruction, computation)
            collective = _collective(kind, instruction, operands, self.chips)
            moved = *itertools.chain(*operands), *_results(instruction, operands)
            bytes_ = sum(a.size for a in moved if a.in_hbm)
        elif opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            operands = self._operands(instruction, computation)
            if target is None or target[1] not in _VIEWS:
                bytes_ = _plain_bytes(instruction, operands)
            if known := _SPLASH.match(instruction.name):
                flops, again = _splash(operands, _SPLASH_PRODUCTS[known[1]])
                bytes_ += again
            elif target and _COMPUTES.match(target[1]):
                uncounted[target[1]] += 1
        else:
            bytes_ = _plain_bytes(instruction, self._operands(instruction, computation))
        return Cost(flops, bytes_, collective.wire, collective.collectives, collective.payload, uncounted)

    def _operands(self, instruction: Instruction, computation: Computation) -> list[tuple[Array, ...]]:
        return [computation.instructions[name].arrays for name in instruction.operands]

    def _inside(self, name: str) -> tuple[float, Cost, Counter[str]]:
        """FLOPs, collectives and unknown calls inside a fused computation."""
        flops, collective, uncounted = 0.0, Cost(), Counter[str]()
        computation = self.computations[name]
        # The TPU compiler spreads a collective over fusions (start, some that compute meanwhile, done) and names it in
        # each; it is counted at its start.
        calls = "".join(i.attributes for i in computation.instructions.values() if i.opcode == "custom-call")
        goes_on = name.startswith("async_collective_fusion") or '"AsyncCollectiveDone"' in calls
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "fusion":
                more = self._inside(instruction.called("calls")[0])
                flops, collective, uncounted = flops + more[0], collective.plus(more[1]), uncounted + more[2]
            elif kind in _COLLECTIVES and goes_on:
                continue
            elif kind in _COLLECTIVES:
                # The TPU compiler writes a reduce-scatter as an all-reduce fused with the slice that each chip keeps.
                sliced = any(user.opcode == "dynamic-slice" for user in computation.users[instruction.name])
                kind = "reduce-scatter" if kind == "all-reduce" and sliced else kind
                operands = self._operands(instruction, computation)
                collective = collective.plus(_collective(kind, instruction, operands, self.chips))
            elif instruction.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
                if target and _COMPUTES.match(target[1]):
                    uncounted[target[1]] += 1
            else:
                flops += self._flops(instruction, computation)
        return flops, collective, uncounted

    def _flops(self, instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode == "dot":
            (lhs,) = computation.instructions[instruction.operands[0]].arrays
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            over = [int(d) for d in contracted[1].split(",") if d] if contracted else []
            return 2 * math.prod(instruction.arrays[0].dims) * math.prod(lhs.dims[d] for d in over)
        if instruction.opcode == "convolution":
            lhs, rhs = (computation.instructions[name].arrays[0] for name in instruction.operands)
            return _convolution_flops(instruction, lhs.dims, rhs.dims)
        return 0.0

    def _fusion_bytes(self, fusion: Instruction, inner: Computation, outer: Computation, starts: bool) -> float:
        """HBM traffic of a fusion; `starts`: whether its collectives are counted here, not at another fusion."""
        total = 0.0
        root = inner.instructions[inner.root]
        if '"AsyncCollectiveDone"' in root.attributes:
            return 0.0
        if '"AsyncCollectiveStart"' in root.attributes:  # hands on what it reads, and gives what will be written
            return sum(a.size for a in fusion.arrays[:2] if a.in_hbm)
        for name, parameter in zip(fusion.operands, inner.parameters):
            arrays = outer.instructions[name].arrays
            if _in_hbm(arrays):
                total += _read(inner, parameter, sum(a.size for a in arrays), starts)
        roots = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, result in zip(fusion.arrays, roots):
            if array.in_hbm:
                total += _written(inner, result, array.size, starts)
        return total

    @property
    def loops(self) -> set[str]:
        """Names of the loops that data end."""
        return {_loop_name(loop) for loop in self._whiles()} & {STEPS, READS, TURNS}

    def _whiles(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from (i for i in computation.instructions.values() if i.opcode == "while")

    @property
    def caches(self) -> list[Array]:
        """What the decode loop carries of [B, K, E, S] and [B, K, S, E]: the rows' own caches and those they share."""
        carried = (a for loop in self._whiles() if _loop_name(loop) == STEPS for a in loop.arrays)
        return [a for a in carried if len(a.dims) == 4 and set(self.slots) & set(a.dims[2:])]

    @property
    def cache(self) -> float:
        """Bytes of the caches in a chip's HBM (small ones lie in on-chip memory)."""
        return sum(a.size for a in self.caches if a.in_hbm)


def _loop_name(loop: Instruction) -> str:
    """The name scope that a loop was traced in, "" where there is none."""
    found = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/while"', loop.attributes)
    return found[1] if found else ""


def _in_hbm(arrays: tuple[Array, ...]) -> bool:
    return any(array.in_hbm for array in arrays)


def _through(computation: Computation, name: str) -> list[Instruction]:
    """Users of a value, through what only renames it."""
    found = []
    for user in computation.users[name]:
        found += _through(computation, user.name) if user.opcode in ("bitcast", "reshape") else [user]
    return found


def _read(inner: Computation, parameter: str, size: float, starts: bool) -> float:
    """Bytes a fusion reads of a parameter: its slices where it only slices, none where it only updates or where a
    collective goes on that started before, else `size`.
    """
    names = {parameter} | {u.name for u in inner.users[parameter] if u.opcode in ("bitcast", "reshape")}
    root = inner.instructions[inner.root]
    total = 0.0
    for user in _through(inner, parameter):
        if user is root and root.opcode == "tuple":
            continue  # passes through
        if user.opcode.removesuffix("-start") in _COLLECTIVES and not starts:
            continue
        first = user.operands[0] in names
        if first and user.opcode in ("dynamic-slice", "slice", "gather"):
            total += sum(a.size for a in user.arrays)
        elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
            return size
    return min(size, total)


def _written(inner: Computation, result: Instruction, size: float, starts: bool) -> float:
    """Bytes a fusion writes of a result: what an update in place touches, nothing of what passes through, else all."""
    while result.opcode in ("bitcast", "reshape"):
        result = inner.instructions[result.operands[0]]
    if result.opcode == "parameter" or (result.opcode in _COLLECTIVES and not starts):
        return 0.0
    if result.opcode in ("dynamic-update-slice", "scatter"):
        target = inner.instructions[result.operands[0]]
        while target.opcode in ("bitcast", "reshape"):
            target = inner.instructions[target.operands[0]]
        if target.opcode == "parameter":
            update = result.operands[1 if result.opcode == "dynamic-update-slice" else 2]
            return min(size, sum(a.size for a in inner.instructions[update].arrays))
    return size


def _plain_bytes(instruction: Instruction, operands: list[tuple[Array, ...]]) -> float:
    """HBM traffic of an instruction that is not fused."""
    opcode = instruction.opcode
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        # Types: (destination, source, context), and ((source), destination, context).
        target = instruction.arrays[0 if opcode == "copy-start" else 1]
        return target.size * (_in_hbm(operands[0]) + target.in_hbm)
    written = sum(a.size for a in instruction.arrays if a.in_hbm)
    if opcode in ("slice", "dynamic-slice", "gather"):
        return written + sum(a.size for a in instruction.arrays) * _in_hbm(operands[0])
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else 2]
        return sum(a.size for a in update) * (_in_hbm(update) + _in_hbm(instruction.arrays))
    return written + sum(a.size for arrays in operands for a in arrays if a.in_hbm)


def _splash(operands: list[tuple[Array, ...]], products: int) -> tuple[float, float]:
    """FLOPs of a splash attention kernel, and the bytes that it reads again beyond its operands: for each pair of
    blocks that meet, keys and values (dkv: queries and what comes back from the output).

    The first operand, the grid [1, blocks, most that one meets] (dkv: the other way round), says how many pairs
    causality and the window leave: the first block meets one, each next one more up to the most. The third: queries.
    """
    (grid,), _, (queries,) = operands[:3]
    most, blocks = sorted(grid.dims[-2:])
    pairs = most * (most + 1) // 2 + (blocks - most) * most
    *rows, tokens, width = queries.dims
    size = tokens // blocks
    each = math.prod(rows) * pairs * size * width
    return 2.0 * products * each * size, 2 * queries.width * each


def _results(instruction: Instruction, operands: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The arrays that a collective gives; the tuples of most that start repeat their operands first."""
    repeated = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    return instruction.arrays[sum(map(len, operands)) if repeated else 0 :]


def _collective(kind: str, instruction: Instruction, operands: list[tuple[Array, ...]], chips: int) -> Cost:
    """One collective: `payload` is the larger of what a chip puts in and gets out, `wire` what a ring moves of it."""
    given = sum(a.size for arrays in operands for a in arrays)
    size = max(given, sum(a.size for a in _results(instruction, operands)))
    group = _group_size(instruction.attributes, chips)
    once = (group - 1) / group
    # To all: what goes to a chip d further on passes d links, the shorter way round.
    to_all = sum(min(d, group - d) for d in range(group)) / group
    shares = {"all-reduce": 2 * once, "all-to-all": to_all, "ragged-all-to-all": to_all, "collective-permute": 1.0}
    return Cost(wire=size * shares.get(kind, once), collectives=Counter({kind: 1}), payload=Counter({kind: size}))


def _group_size(attributes: str, chips: int) -> int:
    """Chips of one replica group, in any of HLO's three notations; all where there is none."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if tiled:
        return int(tiled[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']*)'", named[2]))
    return chips


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """2 a multiply-add of real elements: where window and padding or dilation do not meet, nothing is multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise ValueError(f"HLO text: a convolution without dim_labels: {instruction.name}")
    left, right, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    spatial = sum(c.isdigit() for c in left)

    def each(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * spatial

    pads = [tuple(map(int, pad.split("_"))) for pad in each("pad", "0_0")]
    strides, left_dilation, right_dilation = (
        [int(x) for x in each(name, "1")] for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    result = instruction.arrays[0].dims
    flops = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
    for i in range(spatial):
        size, taps = lhs[left.index(str(i))], rhs[right.index(str(i))]
        pairs = 0
        for place in range(result[out.index(str(i))]):
            for tap in range(taps):
                at = place * strides[i] + tap * right_dilation[i] - pads[i][0]
                pairs += at % left_dilation[i] == 0 and 0 <= at // left_dilation[i] < size
        flops *= pairs
    return flops
