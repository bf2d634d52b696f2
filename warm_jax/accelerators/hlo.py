"""What a compiled program does with memory and wires, read from XLA's text of it (`Compiled.as_text()`).

The text is of one device's program. XLA's own `cost_analysis` knows no collectives, counts the body of a loop once, and
for GPUs that are not here there is none.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
_START = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
# These move nothing by themselves: names for what is there, or what their own computations are counted for.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "async-start", "async-update", "async-done"),
}
_SLICES = ("slice", "dynamic-slice")
# Within a kernel these need all of an operand, or are not looked into.
_MIXING = {
    *("tuple", "reduce", "reduce-window", "scatter", "gather", "dot", "convolution", "sort", "pad", "concatenate"),
    *("dynamic-update-slice", "select-and-scatter", "custom-call", "fusion", "call", "while", "conditional"),
}


class Instruction(NamedTuple):
    """A line: `name = shape op(operands), rest`; the `value` of a constant, or the number of a parameter."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    value: str
    rest: str


class Collective(NamedTuple):
    """All collectives of one kind: how many run, the bytes of their data, and what each device sends for them."""

    kind: str
    count: int
    bytes: int
    sent: int


class Traffic(NamedTuple):
    """What one run of a program moves, a device. `unknown_loops`: loops whose length the text does not tell."""

    memory: int
    collectives: tuple[Collective, ...]
    unknown_loops: int


def _elements(dims: list[int], layout: str) -> int:
    """Elements that an array takes in memory: on a TPU its most minor axes are padded to whole tiles, `:T(8,128)`."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    minor = [int(axis) for axis in filter(None, order.split(","))]
    if tile and len(minor) == len(dims):
        for axis, side in zip(minor, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            dims[axis] = -(-dims[axis] // side) * side
    return math.prod(dims)


def size(shape: str, in_memory: bool = False) -> int:
    """Bytes of all arrays in an HLO shape, a tuple or not.

    With `in_memory` what they take in main memory: with padding, and nothing for those on the chip itself (`S(1)`).
    """
    total = 0
    for kind, dims, layout in _ARRAY.findall(shape):
        if in_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
        sides = [int(side) for side in filter(None, dims.split(","))]
        total += ((_elements(sides, layout) if in_memory else math.prod(sides)) * bits + 7) // 8
    return total


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"not an HLO instruction: {text[:120]}")


def _instruction(line: str) -> Instruction | None:
    found = _START.match(line)
    if not found:
        return None
    begin = found.end()
    after = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
    shape, opening = line[begin:after], line.index("(", after)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[1], shape, line[after:opening].strip(), operands, inside, line[closing + 1 :])


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and the instructions of every computation by name."""
    entry, current, found = "", None, {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (made := _instruction(line)):
            current.append(made)
    return entry, found


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    names = re.findall(r"(?:body|condition|calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", instruction.rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    return names + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])


def _trips(loop: Instruction, every: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs: as the compiler notes, or by "counter < constant", as `lax.scan` counts; else None."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = every[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    limits = [int(one.value) for one in condition if one.op == "constant" and one.value.isdecimal()]
    counts = condition[-1].op == "compare" and "direction=LT" in condition[-1].rest
    return limits[0] if counts and len(limits) == 1 else None


def _group_size(rest: str, devices: int) -> int:
    """Devices that take part in one collective: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['a'=2,'b'=2] {'b'}`."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sides = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sides[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return devices


def _sent(kind: str, data: int, group: int) -> float | int:
    """Bytes that a device sends at least: a ring's, which is the least there is, or the data itself."""
    share = (group - 1) / group
    return {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "all-to-all": share}.get(
        kind, 1
    ) * data


def _shares_needed(body: list[Instruction]) -> dict[str, float]:
    """For each array within a kernel the share of it that is computed or read: less than all where slices alone are.

    What takes each element to one element (a sum, a cast, a transposition) needs of its operands what is needed of it.
    """
    shapes, used = {line.name: line.shape for line in body}, {name for line in body for name in line.operands}
    needed = {line.name: 0.0 if line.name in used else 1.0 for line in body}
    for user in reversed(body):  # operands stand before what uses them
        for operand in dict.fromkeys(user.operands):
            share = 1.0
            if user.op in _SLICES and user.operands[0] == operand:
                share = needed[user.name] * size(user.shape, True) / max(1, size(shapes[operand], True))
            elif user.op not in _MIXING and _count(user.shape) == _count(shapes[operand]):
                share = needed[user.name]
            needed[operand] = min(1.0, needed[operand] + share)
    return needed


def _count(shape: str) -> list[int]:
    """The elements of each array in a shape."""
    return [math.prod(int(side) for side in filter(None, dims.split(","))) for _, dims, _ in _ARRAY.findall(shape)]


def _sliced(one: Instruction, every: dict[str, list[Instruction]]) -> dict[int, int]:
    """Bytes read of the operands, by number, of which a kernel takes slices alone: those of the slices."""
    if one.op in _SLICES:
        return {0: size(one.shape, True)}
    if one.op != "fusion":
        return {}
    body, found = every[_called(one)[0]], {}
    needed = _shares_needed(body)
    for parameter in (line for line in body if line.op == "parameter"):
        share = needed[parameter.name]
        if share < 1:
            found[int(parameter.value)] = round(share * size(parameter.shape, True))
    return found


def traffic(text: str, devices: int) -> Traffic:
    """Of the program that `text` is, on `devices` devices.

    Memory: each kernel reads its operands, or what it slices of them, and writes its results, once, in main memory.
    Collectives: the bytes of the whole array that is reduced or gathered; asynchronous ones count where they start.
    """
    entry, every = computations(text)
    memory, unknown, found, seen = 0, 0, {}, set()

    def visit(name: str, times: int, inside_kernel: bool) -> None:
        nonlocal memory, unknown
        shapes = {one.name: one.shape for one in every[name]}
        for one in every[name]:
            kind = one.op.removesuffix("-start")
            if kind in COLLECTIVES:
                _add(one, kind, times, shapes)
            names, trips = _called(one), _trips(one, every) if one.op == "while" else 1
            unknown += trips is None
            if one.op in ("fusion", "while", "conditional", "call", "async-start"):
                for other in dict.fromkeys(names):
                    visit(other, times * (trips or 1), inside_kernel or one.op == "fusion")
            if not inside_kernel and one.op not in _FREE:
                memory += times * _moved(one, shapes)

    def _moved(one: Instruction, shapes: dict[str, str]) -> int:
        slices, whole = _sliced(one, every), [size(shapes.get(name, ""), True) for name in one.operands]
        read = sum(min(slices.get(i, bytes_), bytes_) for i, bytes_ in enumerate(whole))
        if one.op == "slice-start":  # of the whole array only the slice is read
            return size(one.shape) - sum(size(shapes.get(name, "")) for name in one.operands)
        if one.op.endswith("-start"):
            return read
        return (0 if one.op.endswith("-done") else read) + size(one.shape, True)

    def _add(one: Instruction, kind: str, times: int, shapes: dict[str, str]) -> None:
        channel = re.search(r"channel_id=(\d+)", one.rest)
        if channel and (kind, channel[1]) in seen:  # the same one again, in a computation that another pass copied
            return
        seen.add((kind, channel[1] if channel else one.name))
        data = sum(size(shapes.get(name, "")) for name in one.operands)
        if kind == "all-gather":
            data = size(one.shape) - (data if one.op.endswith("-start") else 0)
        before = found.get(kind, Collective(kind, 0, 0, 0))
        sent = round(times * _sent(kind, data, _group_size(one.rest, devices)))
        found[kind] = Collective(kind, before.count + times, before.bytes + times * data, before.sent + sent)

    if entry:
        visit(entry, 1, False)
    return Traffic(memory, tuple(found[kind] for kind in sorted(found)), unknown)
