"""Count the FLOPs and collectives of a compiled program by reading its text.

The body of a loop counts as often as the loop runs. XLA's own `cost_analysis` counts it once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

DTYPE_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4}
DTYPE_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:(?:\(.*)?->.*)?\{$")
OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][a-z0-9\-]*)\((.*)")
CALLEES = re.compile(r"(calls|body|to_apply|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclass(frozen=True)
class Operation:
    """One line of a program."""

    kind: str  # the opcode, without -start
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result
    operands: tuple[str, ...]
    text: str  # from the first operand to the end of the line

    @property
    def bytes(self) -> float:
        """Size of the largest result."""
        sizes = (DTYPE_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)
        return max(sizes, default=0)


Computation = dict[str, Operation]  # by name, in order


@dataclass(frozen=True)
class ProgramWork:
    """The work of one run of a program on one device."""

    flops: float
    sent_bytes: dict[str, float]  # by kind of collective


def program_work(text: str) -> ProgramWork:
    """Count the work of a program, given `compiled.as_text()`.

    A loop whose number of iterations is not known at compile time counts once.
    """
    computations, entry = _parse(text)

    @cache
    def count(name: str) -> tuple[float, dict[str, tuple[str, float]]]:
        """FLOPs, and (kind, bytes) by channel: the TPU compiler writes one collective in several
        pieces, each next to a product that hides it."""
        computation = computations[name]
        flops, sent = 0.0, {}
        for operation_name, operation in computation.items():
            flops += _flops(operation, computation)
            if operation.kind in COLLECTIVES:
                channel = re.search(r"channel_id=\d+", operation.text)
                key = channel[0] if channel else f"{name}/{operation_name}"
                sent[key] = operation.kind, _sent_bytes(operation)
            for callee, times in _calls(operation, computations):
                callee_flops, callee_sent = count(callee)
                flops += times * callee_flops
                sent |= {key: (kind, times * size) for key, (kind, size) in callee_sent.items()}
        return flops, sent

    flops, channels = count(entry)
    sent_bytes: dict[str, float] = defaultdict(float)
    for kind, size in channels.values():
        sent_bytes[kind] += size
    return ProgramWork(flops, dict(sent_bytes))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a program by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, computation = "", {}
    for line in text.splitlines():
        header = HEADER.match(line)
        operation = None if header else OPERATION.match(line)
        if header:
            computation = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif operation:
            name, result, opcode, rest = operation.groups()
            shapes = tuple(
                (dtype, tuple(int(size) for size in sizes.split(",") if size))
                for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
            )
            arguments = rest[: _closing_parenthesis(rest)]
            operands = re.findall(r"%([\w.\-]+)", arguments) or re.findall(r"[\w.\-]+", arguments)
            kind = opcode.removesuffix("-start")
            computation[name] = Operation(kind, shapes, tuple(operands), rest)
    return computations, entry


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


def _calls(operation: Operation, computations: dict[str, Computation]) -> Iterator[tuple[str, int]]:
    """The computations that an operation runs, and how often."""
    if operation.kind.endswith(("-done", "-update")):
        return
    callees = dict(CALLEES.findall(operation.text))
    condition, body = (
        computations.get(callees.get(role, "").lstrip("%"), {}) for role in ("condition", "body")
    )
    times = _trip_count(operation, condition, body)
    for names in callees.values():
        for name in re.findall(r"[\w.\-]+", names):
            if name in computations:
                yield name, times


def _trip_count(operation: Operation, condition: Computation, body: Computation) -> int:
    """The number of iterations of a loop; 1 for other operations, and if it is unknown.

    Either the compiler states it, or it is the constant that the counter (from 0) is compared with,
    divided by the step. On TPUs, a product whose slices go around a ring in both directions is a
    loop with step 2.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.text)
    if known:
        return int(known[1])
    last = next(reversed(condition.values()), None)
    if last is None or last.kind != "compare" or "direction=LT" not in last.text:
        return 1
    limits = _constants(last, condition)
    return -(-limits[0] // _step(condition[last.operands[0]], body)) if len(limits) == 1 else 1


def _step(counter: Operation, body: Computation) -> int:
    """What one iteration adds to the loop's counter; 1 if that is not a constant."""
    index = re.search(r"index=(\d+)", counter.text)
    result = next(reversed(body.values()), None)
    if index is None or result is None or result.kind != "tuple":
        return 1
    update = body.get(result.operands[int(index[1])])
    steps = _constants(update, body) if update and update.kind == "add" else []
    return steps[0] if len(steps) == 1 else 1


def _constants(operation: Operation, computation: Computation) -> list[int]:
    """The integer constants among the operands of an operation."""
    operands = (computation.get(name) for name in operation.operands)
    texts = (operand.text for operand in operands if operand and operand.kind == "constant")
    return [int(match[1]) for match in (re.match(r"(\d+)\)", text) for text in texts) if match]


def _flops(operation: Operation, computation: Computation) -> float:
    """FLOPs of a product, 2 per multiply-add; 0 for other operations."""
    if operation.kind not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.get(name) for name in operation.operands[:2])
    if left is None or right is None:
        raise ValueError(f"no operand in this computation for {operation.text[:200]!r}")
    lhs, rhs, out = (array.shapes[0][1] for array in (left, right, operation))
    if operation.kind == "convolution":
        return _convolution_flops(operation.text, lhs, rhs, out)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.text)
    if not contracted:
        return 0.0
    return 2.0 * math.prod(out) * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i)


Shape = tuple[int, ...]


def _convolution_flops(text: str, lhs: Shape, rhs: Shape, out: Shape) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels
    lhs_sizes, rhs_sizes, out_sizes = (
        dict(zip(axes, shape, strict=True))
        for axes, shape in zip(labels.groups(), (lhs, rhs, out), strict=True)
    )
    products = rhs_sizes["i"]
    for axis, size in out_sizes.items():
        products *= 1 if axis.isdigit() else size
    for n, axis in enumerate(axis for axis in out_sizes if axis.isdigit()):
        products *= _spatial_pairs(n, lhs_sizes[axis], rhs_sizes[axis], out_sizes[axis], text)
    return 2.0 * products


def _spatial_pairs(n: int, lhs: int, rhs: int, out: int, text: str) -> int:
    """How many pairs of output and kernel positions along spatial axis n meet an input position
    that is not padding. TPUs write batched products as such convolutions."""
    window = re.search(r"window=\{([^}]*)\}", text)
    settings = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}

    def setting(name: str, default: str) -> str:
        return settings[name].split("x")[n] if name in settings else default

    stride, lhs_dilate, rhs_dilate = (
        int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(setting("pad", "0_0").split("_")[0])
    position = np.arange(out)[:, None] * stride - low + np.arange(rhs)[None] * rhs_dilate
    inside = (position >= 0) & (position <= (lhs - 1) * lhs_dilate)
    return int((inside & (position % lhs_dilate == 0)).sum())


def _sent_bytes(operation: Operation) -> float:
    """Bytes that a device sends, if devices form a ring."""
    size = _group_size(operation.text)
    share = (size - 1) / size
    factors = {"all-reduce": 2 * share, "reduce-scatter": size - 1, "collective-permute": 1.0}
    return operation.bytes * factors.get(operation.kind, share)


def _group_size(text: str) -> int:
    """Number of devices in a collective, which XLA writes as a list of their ids, as the shape of
    such a list, or as axes of a mesh."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return listed[1].count(",") + 1
    shape = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if shape:
        return int(shape[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if not mesh:
        return 2
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'(\w+)'", mesh[2])
    return math.prod(int(sizes[axis]) for axis in axes if axis in sizes)
