"""Count the bytes that a TPU program reads from and writes to the chip's main memory (HBM).

An operand or result in HBM counts once, with the padding of its tiles. A slice counts as much as it
takes, an update as much as it changes. What the compiler keeps in the memory on the chip does not
count; the transfers to and from there are operations of their own, most of them asynchronous.
"""

from __future__ import annotations

import re

from paligemma_jax.planning.hlo import ArrayType, Computation, Operation, Program

# Operations that move nothing; the contents of control flow count by themselves.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
FREE |= {"while", "conditional", "call", "async-done", "opt-barrier", "partition-id", "replica-id"}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
SLICES = {"slice", "dynamic-slice", "gather"}  # read a part of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # overwrite a part of it with this operand


def hbm_bytes(operation: Operation, computation: Computation, program: Program) -> float:
    """Bytes of HBM that one run of an operation reads and writes.

    An asynchronous operation counts where it is done, because that line states its result.
    """
    if operation.opcode in FREE or operation.custom_target in FREE_CALLS:
        return 0.0
    if operation.opcode.endswith(("-start", "-update")):
        return 0.0
    start = operation
    while start.opcode.endswith(("-done", "-update")):
        start = computation[start.operands[0]]
    body = program.fused(start)
    carried = _carried_along(start)
    total = 0.0
    for i, name in enumerate(start.operands):
        arrays = computation[name].results if name in computation else ()
        if len(arrays) == 1 and arrays[0].in_hbm and i not in carried.values():
            size = arrays[0].bytes
            part = _parameter_bytes(body, i, size, program) if body else None
            total += _operand_bytes(start, i, operation.results[0], size) if part is None else part
    for i, array in enumerate(operation.results):
        if array.in_hbm and i not in carried:
            total += _result_bytes(start, i, computation, program) or array.bytes
    return total


def _carried_along(operation: Operation) -> dict[int, int]:
    """Operands by the results that are the same memory, where these are not read or written.

    A fusion may do a piece of a collective beside its own work: the collective counts where it
    starts. A kernel states which of its operands it changes in place: these count once.
    """
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", operation.text)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", aliased[1]) if aliased else []
    in_place = {int(result or 0): int(operand) for result, operand in pairs}
    if "calls=%async_collective" in operation.text:
        return in_place
    return dict.fromkeys(in_place, -1) if operation.kind == "custom-call" else {}


def _operand_bytes(operation: Operation, i: int, result: ArrayType, size: float) -> float:
    """Bytes that an operation outside of fusions reads of operand i."""
    if i == 0 and operation.kind in SLICES:
        return result.bytes
    return 0.0 if i == 0 and operation.kind in UPDATES else size


def _parameter_bytes(body: Computation, i: int, size: float, program: Program) -> float:
    """Bytes that a fusion reads of its operand i, which has `size` bytes."""
    aliases = [
        parameter
        for parameter in body.values()
        if parameter.opcode == "parameter" and parameter.text.startswith(f"{i})")
    ]
    total = 0.0
    while aliases:
        alias = aliases.pop()
        if alias.root:
            return size
        for use in body.users_of(alias):
            inner = program.fused(use)
            places = [j for j, operand in enumerate(use.operands) if operand == alias.name]
            if use.kind == "bitcast":
                aliases.append(use)
            elif inner:
                total += sum(_parameter_bytes(inner, j, size, program) for j in places)
            else:
                total += sum(_operand_bytes(use, j, use.results[0], size) for j in places)
    return min(total, size)


def _result_bytes(
    operation: Operation, i: int, computation: Computation, program: Program
) -> float | None:
    """Bytes that an operation writes of its result i if it is an update; else None."""
    body = program.fused(operation)
    if body and body.root:
        root = body.root
        if root.kind == "tuple":
            root = body[root.operands[i]]
        while root.kind == "bitcast":
            root = body[root.operands[0]]
        return _result_bytes(root, 0, body, program)
    if operation.kind in UPDATES:
        update = computation[operation.operands[UPDATES[operation.kind]]]
        return update.results[0].bytes
    return None
