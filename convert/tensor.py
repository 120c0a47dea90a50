"""Tensors that stay in their files: slices are read when they are needed, and written elsewhere
block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from convert.layout import layout_shape, reorder

if TYPE_CHECKING:
    from jax import Array

DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS = {name: np.dtype(name) for name in ("int8", "uint8")}  # of codes (`convert.quantized`)
BLOCK = 2**24  # bytes per read and write; each thread has one block in memory
STRIP = 64  # elements; transposing in strips of this width stays in the cache (1.1 GB/s, not 0.1)
THREADS = min(4, os.cpu_count() or 1)

Index = tuple[slice, ...]
Progress = Callable[[int], object]  # called with the number of bytes of each write


def no_progress(nbytes: int) -> None:
    """The default `Progress`."""


@dataclass(frozen=True)
class Tensor:
    """An array that is not in memory.

    An index has one slice for each leading axis; () is the full array. `raw(index)` returns a slice
    in the dtype of the file: a view of a memory map made for this call, so that only the pages used
    are read, and all of them are released with the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    raw: Callable[[Index], np.ndarray]
    column_major: bool = False  # a matrix whose first axis is contiguous in the file

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def numpy(self, index: Index = ()) -> np.ndarray:
        """Return a slice in `dtype`, as a view of the file if possible.

        Raises:
            ValueError: If a finite number is beyond the range of `dtype`.
        """
        array = self.raw(index)
        if array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):  # raised below
            cast = array.astype(self.dtype)
        if self.dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(array).all():
            raise ValueError("values exceed 65504, the float16 maximum; use bfloat16 or float32")
        return cast

    def load(self, index: Index = ()) -> np.ndarray:
        """Return a slice in `dtype`, contiguous and in its own memory."""
        array = contiguous(self.numpy(index))
        return array if array.flags.owndata else array.copy()

    def cast(self, dtype: str) -> Tensor:
        return replace(self, dtype=np.dtype(dtype))


def map_file(
    file: Path | IO[bytes], offset: int, dtype: np.dtype, shape: tuple[int, ...], order: str = "C"
) -> Tensor:
    """The tensor stored uncompressed in `file` from byte `offset`, in C or Fortran order."""
    memory_order = "F" if order == "F" else "C"

    def raw(index: Index) -> np.ndarray:
        return np.asarray(np.memmap(file, dtype, "r", offset, shape, memory_order))[index]

    return Tensor(shape, dtype, raw, column_major=order == "F" and len(shape) == 2)


def from_array(array: np.ndarray | Array, position: tuple[int, ...] = ()) -> Tensor:
    """array[position] in memory as a Tensor. For a jax array, only the slices used are copied to
    the host."""

    def raw(index: Index) -> np.ndarray:
        return np.asarray(array[(*position, *index)])

    return Tensor(tuple(array.shape[len(position) :]), np.dtype(array.dtype), raw)


def select(tensor: Tensor, position: tuple[int, ...]) -> Tensor:
    """tensor[position]: one layer of a stacked tensor, one part of a fused one."""
    if not position:
        return tensor
    shape = tensor.shape[len(position) :]
    return Tensor(shape, tensor.dtype, lambda index: tensor.raw(())[position][index])


def relayout(tensor: Tensor, source: str, target: str, sizes: dict[str, int]) -> Tensor:
    """The same tensor in another layout (`convert.layout`)."""
    if source == target:
        return tensor

    def raw(index: Index) -> np.ndarray:
        return reorder(tensor.raw(()), source, target, sizes)[index]

    axes = target.split()
    is_transposed = len(axes) == 2 and axes == source.split()[::-1]
    column_major = is_transposed and not tensor.column_major
    return Tensor(layout_shape(target, sizes), tensor.dtype, raw, column_major)


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of a table; rows beyond its end are the mean of its rows.

    With the mean, a padding row can never have the largest logit. (transformers' own converter
    draws such rows from a narrow normal distribution around it.)
    """
    stored, shape = tensor.shape[0], (rows, *tensor.shape[1:])
    if rows <= stored:
        return replace(tensor, shape=shape, raw=lambda index: tensor.raw(())[:rows][index])
    mean: list[np.ndarray] = []  # computed once, when first needed

    def raw(index: Index) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(rows)
        real = tensor.raw((slice(start, min(stop, stored)), *index[1:]))
        if stop <= stored:
            return real
        if not mean:
            total = np.sum([block.sum(0, np.float64) for block in blocks(tensor)], axis=0)
            mean.append((total / stored).astype(real.dtype))
        fill = np.broadcast_to(mean[0], (stop - max(start, stored), *mean[0].shape))
        return np.concatenate([real, fill[(slice(None), *index[1:])]])

    return replace(tensor, shape=shape, raw=raw)


def blocks(tensor: Tensor, transposed: bool = False) -> Iterator[np.ndarray]:
    """Yield the tensor, or its transpose, in C order: contiguous arrays of about BLOCK bytes."""
    length = tensor.shape[-1 if transposed else 0]
    step = max(1, BLOCK * length // max(1, tensor.nbytes))
    leading = (slice(None),) * (len(tensor.shape) - 1) if transposed else ()
    for start in range(0, length, step):
        block = tensor.numpy((*leading, slice(start, min(start + step, length))))
        yield contiguous(block.T if transposed else block)


def contiguous(view: np.ndarray) -> np.ndarray:
    """The array in C order, copied in strips unless it already is."""
    if view.flags.c_contiguous:
        return view
    result = np.empty(view.shape, view.dtype)
    bits = f"u{view.itemsize}"  # numpy copies integers faster than bfloat16
    source, target = view.view(bits), result.view(bits)
    for start in range(0, view.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]
    return result


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    pairs = zip(blocks(a), blocks(b), strict=True)
    return all(block.tobytes() == other.tobytes() for block, other in pairs)


class Job(NamedTuple):
    """Write `tensor`, or its transpose, to `file` from byte `offset`."""

    path: str  # for errors
    tensor: Tensor
    file: Path
    offset: int
    transposed: bool = False


def run_jobs(jobs: Iterable[Job], progress: Progress) -> None:
    """Run all jobs, with a thread per file (threads that share a file only wait for each other).
    Each thread has one block in memory."""

    def store(file: Path, jobs: list[Job]) -> None:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as out:
            for job in jobs:
                out.seek(job.offset)
                for block in name_errors(job.path, blocks(job.tensor, job.transposed)):
                    rest = block.reshape(-1).view(np.uint8).data
                    while rest:
                        rest = rest[out.write(rest) :]
                    progress(block.nbytes)

    by_file = {file: list(group) for file, group in groupby(jobs, key=lambda job: job.file)}
    pool = ThreadPoolExecutor(THREADS)
    try:
        for _ in pool.map(store, by_file.keys(), by_file.values()):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def name_errors(path: str, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the blocks of a tensor, and add its path to any ValueError raised."""
    try:
        yield from blocks
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
