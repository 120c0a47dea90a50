"""Count the FLOPs and the traffic between devices of a compiled program by reading its text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from paligemma_jax.planning.hlo import Computation, Operation, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class ProgramWork:
    """The work of one run of a program on one device."""

    flops: float  # of matrix products, 2 per multiply-add, and as kernels state them
    int8_flops: float  # those of products of two int8 matrices
    sent_bytes: dict[str, float]  # by kind of collective


def program_work(program: Program) -> ProgramWork:
    """Count the work of a program."""
    flops = int8_flops = 0.0
    channels: dict[str, tuple[str, float]] = {}
    for operation, computation, times, _ in program.runs():
        work = times * operation_flops(operation, computation)
        flops += work
        if work and operation.custom_target == "" and _is_int8(operation, computation):
            int8_flops += work
        if operation.kind in COLLECTIVES:
            # The TPU compiler writes one collective in several pieces, each next to a product that
            # hides it.
            channel = re.search(r"channel_id=\d+", operation.text)
            key = channel[0] if channel else operation.name
            channels[key] = operation.kind, times * _sent_bytes(operation)
    sent_bytes: dict[str, float] = defaultdict(float)
    for kind, size in channels.values():
        sent_bytes[kind] += size
    return ProgramWork(flops, int8_flops, dict(sent_bytes))


def operation_flops(operation: Operation, computation: Computation) -> float:
    """FLOPs of a product, and those of a kernel as its cost estimate states them; 0 for others."""
    if operation.kind == "custom-call":
        return kernel_estimate(operation)["flops"]
    if operation.kind not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.get(name) for name in operation.operands[:2])
    if left is None or right is None:
        raise ValueError(f"no operand in this computation for {operation.text[:200]!r}")
    lhs, rhs, out = (array.results[0].shape for array in (left, right, operation))
    if operation.kind == "convolution":
        return _convolution_flops(operation.text, lhs, rhs, out)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.text)
    if not contracted:
        return 0.0
    return 2.0 * math.prod(out) * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i)


def kernel_estimate(operation: Operation) -> dict[str, float]:
    """The "flops" and "bytes_accessed" that a kernel declares (`pl.CostEstimate`), or zeros."""
    return {
        name: float(match[1]) if match else 0.0
        for name in ("flops", "bytes_accessed")
        for match in [re.search(rf'"cost_estimate":\{{[^}}]*"{name}":"(\d+)"', operation.text)]
    }


def _is_int8(operation: Operation, computation: Computation) -> bool:
    """Whether a product is of two int8 matrices, for which the matrix units are twice as fast."""
    dtypes = [computation[name].results[0].dtype for name in operation.operands[:2]]
    return all(dtype in ("s8", "u8") for dtype in dtypes)


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
    group = _group_size(operation.text)
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1.0}
    size = max((array.packed_bytes for array in operation.results), default=0)
    return size * factors.get(operation.kind, share)


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
