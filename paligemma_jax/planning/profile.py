"""What each operation of a TPU program costs, and the line of the model that it comes from."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from paligemma_jax.planning.chips import Chip
from paligemma_jax.planning.hlo import Computation, Operation, Program
from paligemma_jax.planning.traffic import hbm_bytes
from paligemma_jax.planning.work import kernel_estimate

# Building blocks of the model: for an operation of theirs, the line that calls them says more.
HELPERS = re.compile(
    r"paligemma_jax/((model/(layers|constrain|stages|stack|codes)|lora)\.py|quantization/|sharding/)"
)
# Parts of an operation's name that jax adds: the transformations and loops around it.
JAX_SCOPES = r"jit\([^)]*\)|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint"
JAX_SCOPES += r"|rematted_computation|custom_[jv][jv]p_call"

UNKNOWN_CYCLES = 2**63 - 1  # of operations that do not run on the core, such as offloaded gathers


@dataclass(frozen=True)
class OperationCost:
    """The cost of an operation on each chip, summed over its runs and over the layers."""

    name: str  # scope and primitive, such as decoder/layers/mlp/dot_general
    line: str  # such as paligemma_jax/model/decoder.py:73; empty if the compiler does not state it
    bytes: float  # of HBM, read and written
    cycles: float  # by the compiler's estimate; see `_cycles`
    seconds: float  # the longer of what the two take


def operation_costs(program: Program, lines: dict[str, str], chip: Chip) -> list[OperationCost]:
    """Return the operations of a program, costliest first. `lines` are its `source_lines`."""
    costs: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for operation, computation, times, scheduled in program.runs():
        size = hbm_bytes(operation, computation, program) if scheduled else 0.0
        cycles = _cycles(operation, size, chip) if scheduled else 0.0
        if size or cycles:
            name, frame = _origin(operation, computation)
            cost = costs[name, lines.get(frame, "")]
            seconds = max(size / chip.bandwidth, cycles / chip.clock)
            for i, value in enumerate((size, cycles, seconds)):
                cost[i] += times * value
    rows = [OperationCost(*key, *cost) for key, cost in costs.items()]
    return sorted(rows, key=lambda row: row.seconds, reverse=True)


def _cycles(operation: Operation, size: float, chip: Chip) -> float:
    """The compiler's estimate of one run.

    The compiler does not estimate Pallas kernels. They count as long as their declared FLOPs and
    bytes take at the chip's published rates.
    """
    if operation.custom_target == "tpu_custom_call":
        declared = kernel_estimate(operation)
        moved = max(size, declared["bytes_accessed"]) / chip.bandwidth
        return chip.clock * max(declared["flops"] / chip.flops, moved)
    estimate = re.search(r'"estimated_cycles":"(\d+)"', operation.text)
    cycles = int(estimate[1]) if estimate else 0
    return float(cycles) if cycles != UNKNOWN_CYCLES else 0.0


def _origin(operation: Operation, computation: Computation) -> tuple[str, str]:
    """The name of an operation, and the id of its stack frame.

    The compiler's own operations have neither. A prefetch takes those of the operation it is for;
    others, such as changes of layout, the scope of their neighbor.
    """
    name, frame = _metadata(operation)
    if not name:
        name, frame = _nearest_metadata(operation, computation)
        if not operation.opcode.endswith("-done"):
            scope = name.rpartition("/")[0] if "/" in name else name  # else it is an argument
            name = f"{scope}/{operation.kind}"
    return _short_name(name) or operation.kind.removesuffix("-done"), frame


def _short_name(name: str) -> str:
    """Remove what jax adds to the scopes of the model, and the number of the layer."""
    suffix = " (backward)" if "transpose(" in name else ""
    if "rematted_computation" in name:
        suffix = " (recomputed)"
    for _ in range(2):  # transpose(jvp(scope))
        name = re.sub(r"\b(?:jvp|transpose)\(([^()]*)\)", r"\1", name)
    name = re.sub(r"layers(/\d+|\[\d+\])", "layers", name)
    scopes = [
        scope
        for scope in name.split("/")
        if scope and not re.fullmatch(JAX_SCOPES, scope) and "->" not in scope  # einsum's equation
    ]
    return "/".join(scopes) + suffix if scopes else ""


def _metadata(operation: Operation) -> tuple[str, str]:
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', operation.text)
    frame = re.search(r"stack_frame_id=(\d+)", operation.text)
    return name[1] if name else "", frame[1] if frame else ""


def _nearest_metadata(operation: Operation, computation: Computation) -> tuple[str, str]:
    """The metadata of what uses an operation's result, else of what it is computed from."""
    for following in (computation.users_of, computation.operands_of):
        current = [operation]
        for _ in range(4):
            current = [other for other in following(current[0]) if other.kind != "tuple"]
            if not current:
                break
            name, frame = _metadata(current[0])
            if name:
                return name, frame
    return "", ""


def source_lines(text: str) -> dict[str, str]:
    """The line of the model by the id of a stack frame, from the tables that precede a program."""
    files = {key: name for key, name in _rows(text, "FileNames", r'(\d+) "(.*)"')}
    locations = _rows(text, "FileLocations", r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
    places = {key: f"{files[file]}:{line}" for key, file, line in locations}
    stack = _rows(text, "StackFrames", r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    lines: dict[str, str] = {}
    for frame, place, caller in stack:  # callers come first, with ids that are one too large
        lines[frame] = _model_line(places[place], lines.get(str(int(caller) - 1), ""))
    return lines


def _model_line(place: str, caller: str) -> str:
    """A place in the project, or the line that calls it if the place is a helper or elsewhere."""
    _, found, line = place.rpartition("/paligemma_jax/")
    own = f"paligemma_jax/{line}" if found else ""
    return next((line for line in (own, caller) if line and not HELPERS.match(line)), own or caller)


def _rows(text: str, title: str, pattern: str) -> list[tuple[str, ...]]:
    table = re.search(rf"^{title}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^{pattern}", table[1], re.MULTILINE) if table else []
