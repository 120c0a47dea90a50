"""What a compiled program does on each device, read from its text: FLOPs and collectives, those in loops as often as the loops turn.

XLA's own `cost_analysis` counts the body of a loop once, whatever the number of layers that it runs through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Operation:
    kind: str  # without -start
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # what it results in, as (dtype, shape)
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> float:
        """Of the largest part of the result."""
        return max((SIZES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes), default=0)


@dataclass
class ProgramWork:
    """Of one run of the program on one device."""

    flops: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)  # bytes, by kind of collective


def program_work(text: str) -> ProgramWork:
    """Of the text of a program, as `compiled.as_text()` gives it. A loop whose turns are not known when it is compiled counts once."""
    bodies, entry = _computations(text)

    @cache
    def of(name: str) -> tuple[float, dict[str, tuple[str, float]]]:
        """FLOPs, and (kind, bytes) by channel: a TPU writes one collective in many pieces, each beside a product that it hides behind."""
        flops, sent = 0.0, {}
        for own, operation in bodies[name].items():
            flops += _flops(operation, bodies[name].get)
            if operation.kind in COLLECTIVES:
                channel = re.search(r"channel_id=\d+", operation.text)
                sent[channel[0] if channel else f"{name}/{own}"] = operation.kind, _sent(operation)
            for called, times in _calls(operation, bodies):
                more, also = of(called)
                flops += times * more
                sent |= {channel: (kind, times * size) for channel, (kind, size) in also.items()}
        return flops, sent

    flops, channels = of(entry)
    sent: dict[str, float] = {}
    for kind, size in channels.values():
        sent[kind] = sent.get(kind, 0.0) + size
    return ProgramWork(flops, sent)


def _computations(text: str) -> tuple[dict[str, dict[str, Operation]], str]:
    """Every computation by name as operations by name, and the name of the first to run."""
    bodies: dict[str, dict[str, Operation]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?->.*\{$|(ENTRY )?%?([\w.\-]+) \{$", line):
            name = head[2] or head[4]
            body = bodies[name] = {}
            entry = name if head[1] or head[3] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][a-z0-9\-]*)\((.*)", line):
            shapes = tuple((dtype, tuple(map(int, dims.split(",") if dims else ()))) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[2]))
            inside = found[4][: _closing(found[4])]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside))
            body[found[1]] = Operation(found[3].removesuffix("-start"), shapes, operands, found[4])
    return bodies, entry


def _closing(text: str) -> int:
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    return len(text)


def _calls(operation: Operation, bodies: dict[str, dict[str, Operation]]) -> Iterator[tuple[str, int]]:
    """The computations that it runs, and how often."""
    if operation.kind.endswith(("-done", "-update")):
        return
    called = dict(re.findall(r"(calls|body|to_apply|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)", operation.text))
    turns = _turns(operation, *(bodies.get(called.get(part, "").lstrip("%"), {}) for part in ("condition", "body")))
    for names in called.values():
        for name in re.findall(r"[\w.\-]+", names):
            if name in bodies:
                yield name, turns


def _turns(operation: Operation, condition: dict[str, Operation], body: dict[str, Operation]) -> int:
    """Of a loop: what the compiler says, or the constant that its counter, from 0 on, is compared with, over what a turn adds to it.

    A TPU's product of slices that go round in a ring, both ways, is a loop of two rounds a turn.
    """
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.text):
        return int(told[1])
    last = next(reversed(condition.values()), None)
    if last is None or last.kind != "compare" or "direction=LT" not in last.text:
        return 1
    limits = [number for name in last.operands if (number := _constant(condition.get(name))) is not None]
    return -(-limits[0] // _step(condition[last.operands[0]], body)) if len(limits) == 1 else 1


def _step(counter: Operation, body: dict[str, Operation]) -> int:
    """What a turn of `body` adds to the counter, one of the values that the loop hands on; 1 if it is not to be seen."""
    place, result = re.search(r"index=(\d+)", counter.text), next(reversed(body.values()), None)
    if place is None or result is None or result.kind != "tuple":
        return 1
    added = body.get(result.operands[int(place[1])])
    numbers = [number for name in added.operands if (number := _constant(body.get(name)))] if added and added.kind == "add" else []
    return numbers[0] if len(numbers) == 1 else 1


def _constant(operation: Operation | None) -> int | None:
    whole = operation and operation.kind == "constant" and re.match(r"(\d+)\)", operation.text)
    return int(whole[1]) if whole else None


def _flops(operation: Operation, find: Callable[[str], Operation | None]) -> float:
    """2 a multiply-add, of products alone."""
    if operation.kind not in ("dot", "convolution"):
        return 0.0
    left, right = (find(name) for name in operation.operands[:2])
    if left is None or right is None:
        raise ValueError(f"an operand is missing: {operation.text[:200]}")
    out, (lhs, rhs) = operation.shapes[0][1], (side.shapes[0][1] for side in (left, right))
    if operation.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.text)
        return 2.0 * math.prod(out) * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i) if contracted else 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.text)
    assert labels
    spatial = [letter for letter in labels[3] if letter.isdigit()]
    size = lambda n, letter: (out, lhs, rhs)[n][labels.groups()[n - 1].index(letter)]  # groups: lhs, rhs, out
    pairs = [_pairs(n, size(1, letter), size(2, letter), size(0, letter), operation.text) for n, letter in enumerate(spatial)]
    rest = math.prod(size for size, letter in zip(out, labels[3]) if not letter.isdigit())
    return 2.0 * rest * rhs[labels[2].index("i")] * math.prod(pairs)


def _pairs(n: int, lhs: int, rhs: int, out: int, text: str) -> int:
    """How often a place of the output meets a place of the kernel on one that is no padding, along spatial axis n: TPUs write batches so."""
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1])) if (found := re.search(r"window=\{([^}]*)\}", text)) else {}
    one = lambda name, default: window[name].split("x")[n] if name in window else default
    stride, lhs_dilate, rhs_dilate = (int(one(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(one("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride - low + np.arange(rhs)[None] * rhs_dilate
    return int(((at >= 0) & (at <= (lhs - 1) * lhs_dilate) & (at % lhs_dilate == 0)).sum())


def _sent(operation: Operation) -> float:
    """Bytes that a device sends, in a ring."""
    n = _group(operation.text)
    part = (n - 1) / n
    scale = {"all-reduce": 2 * part, "reduce-scatter": n - 1, "collective-permute": 1.0}
    return operation.bytes * scale.get(operation.kind, part)


def _group(text: str) -> int:
    """How many devices take part together: XLA writes them as a list, as the shape of one, or as axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]) if axis in sizes)
    return 2
