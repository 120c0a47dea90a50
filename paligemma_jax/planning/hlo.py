"""Read the text of a compiled program: its operations, and how often each of them runs.

XLA's own `cost_analysis` counts the body of a loop once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

DTYPE_BYTES = {"s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "pred": 1, "s8": 1, "u8": 1}
DTYPE_BYTES |= {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
DTYPE_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1}  # 4 bytes for all others

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:(?:\(.*)?->.*)?\{$")
OPERATION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][a-z0-9\-]*)\((.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
CALLEES = re.compile(r"\b(calls|body|to_apply|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
CONTROL_FLOW = ("while", "conditional", "call", "async")


@dataclass(frozen=True)
class ArrayType:
    """The dtype, shape and layout of an operand or result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""  # such as 1,0:T(8,128)(2,1)S(1)

    @property
    def in_hbm(self) -> bool:
        """Whether it is in the chip's main memory: memory space 0, which the layout omits.

        Space 1 of a TPU is vector memory, on the chip; the others are for scalars and semaphores.
        """
        return not re.search(r"S\([1-9]", self.layout)

    @property
    def packed_bytes(self) -> float:
        """Size without padding."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 4)

    @property
    def bytes(self) -> float:
        """Size in memory, where the minor axes are padded to whole tiles."""
        order, _, tiling = self.layout.partition(":")
        sizes = [self.shape[int(axis)] for axis in order.split(",") if axis] or [*self.shape]
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        for i, tile_size in enumerate(reversed(tile[1].split(",")) if tile else ()):
            if i < len(sizes):  # minor axes first
                sizes[i] = -(-sizes[i] // int(tile_size)) * int(tile_size)
        return math.prod(sizes) * DTYPE_BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Operation:
    """One line of a program."""

    name: str
    opcode: str
    results: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    text: str  # from the first operand to the end of the line
    root: bool

    @property
    def kind(self) -> str:
        """The opcode, which is the same for an operation and the start of an asynchronous one."""
        return self.opcode.removesuffix("-start")

    @property
    def custom_target(self) -> str:
        """The function that a custom call runs; empty for other operations."""
        target = re.search(r'custom_call_target="(\w+)"', self.text)
        return target[1] if target else ""


class Computation(dict[str, Operation]):
    """The operations of a function, by name and in order."""

    @cached_property
    def root(self) -> Operation | None:
        """The operation that computes the result."""
        return next((operation for operation in self.values() if operation.root), None)

    @cached_property
    def _users(self) -> dict[str, list[Operation]]:
        users: dict[str, list[Operation]] = {}
        for operation in self.values():
            for name in dict.fromkeys(operation.operands):
                users.setdefault(name, []).append(operation)
        return users

    def users_of(self, operation: Operation) -> list[Operation]:
        """The operations that read the result of another."""
        return self._users.get(operation.name, [])

    def operands_of(self, operation: Operation) -> list[Operation]:
        """The operations whose results another reads."""
        return [self[name] for name in operation.operands if name in self]


class Run(NamedTuple):
    """An operation that a program runs."""

    operation: Operation
    computation: Computation
    times: int
    scheduled: bool  # it runs by itself, not as a part of another operation


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parse `compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        entry, computation = "", Computation()
        for line in text.splitlines():
            header = HEADER.match(line)
            operation = None if header else OPERATION.match(line)
            if header:
                computation = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
            elif operation:
                computation[operation[2]] = _parse_operation(*operation.groups())
        return cls(computations, entry)

    def runs(self) -> Iterator[Run]:
        """Yield the operations that the program runs, with those inside fusions.

        A loop whose number of iterations is not known at compile time counts once.
        """
        yield from self._runs(self.entry, 1, True)

    def _runs(self, name: str, times: int, scheduled: bool) -> Iterator[Run]:
        computation = self.computations[name]
        for operation in computation.values():
            yield Run(operation, computation, times, scheduled)
            inside = scheduled and operation.kind in CONTROL_FLOW
            for callee, count in self._calls(operation):
                yield from self._runs(callee, times * count, inside)

    def fused(self, operation: Operation) -> Computation | None:
        """The operations of a fusion; None if it is something else."""
        callee = re.search(r"calls=%?([\w.\-]+)", operation.text)
        return self.computations.get(callee[1]) if callee else None

    def _calls(self, operation: Operation) -> Iterator[tuple[str, int]]:
        """The computations that an operation runs, and how often."""
        if operation.opcode.endswith(("-done", "-update")):
            return
        callees = dict(CALLEES.findall(operation.text))
        condition, body = (
            self.computations.get(callees.get(role, "").lstrip("%"), Computation())
            for role in ("condition", "body")
        )
        times = _trip_count(operation, condition, body)
        for names in callees.values():
            for name in re.findall(r"[\w.\-]+", names):
                if name in self.computations:
                    yield name, times


def _parse_operation(root: str, name: str, result: str, opcode: str, rest: str) -> Operation:
    results = tuple(
        ArrayType(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in ARRAY.findall(result)
    )
    arguments = rest[: _closing_parenthesis(rest)]
    operands = re.findall(r"%([\w.\-]+)", arguments) or re.findall(r"[\w.\-]+", arguments)
    return Operation(name, opcode, results, tuple(operands), rest, bool(root))


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


def _trip_count(operation: Operation, condition: Computation, body: Computation) -> int:
    """The number of iterations of a loop; 1 for other operations, and if it is unknown.

    Either the compiler states it, or it is the constant that the counter (from 0) is compared with,
    divided by the step. On TPUs, a product whose slices go around a ring in both directions is a
    loop with step 2.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.text)
    if known:
        return int(known[1])
    last = condition.root
    if last is None or last.kind != "compare" or "direction=LT" not in last.text:
        return 1
    limits = _constants(last, condition)
    return -(-limits[0] // _step(condition[last.operands[0]], body)) if len(limits) == 1 else 1


def _step(counter: Operation, body: Computation) -> int:
    """What one iteration adds to the loop's counter; 1 if that is not a constant."""
    index = re.search(r"index=(\d+)", counter.text)
    result = body.root
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
