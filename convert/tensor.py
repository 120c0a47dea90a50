"""Tensors that are not in memory: any slice of them is read when it is asked for, and written elsewhere block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.layout import layout_shape, reorder

DTYPES = {name: np.dtype(name) for name in ("float32", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
INTEGERS = {name: np.dtype(name) for name in ("int8", "uint8")}  # of codes (`convert.quantized`)
BLOCK = 2**24  # bytes read and written at once: what a conversion holds in memory, once a thread
STRIP = 64  # elements: transposing in strips this wide stays in the cache (1.1 GB/s a core; whole matrices at once: 0.1)
THREADS = min(4, os.cpu_count() or 1)

Index = tuple[slice, ...]
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Tensor:
    """An array in a file. `read(index)` gives the slices of `index` (one a leading axis; () is all) as `dtype`.

    `raw` does so in the dtype of the file. What it returns of a file is a view into a mapping that is made for this one call:
    only the pages that are looked at are read, and they are given back when the array is dropped.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    raw: Callable[[Index], np.ndarray]
    columns: bool = False  # two axes, the first of which is the contiguous one in the file

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, index: Index = ()) -> np.ndarray:
        """ValueError if a finite number is beyond the range of `dtype`."""
        array = self.raw(index)
        if array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):  # told below
            result = array.astype(self.dtype)
        if self.dtype == np.float16 and not np.isfinite(result).all() and np.isfinite(array).all():
            raise ValueError("it has numbers beyond 65504, the largest float16; take bfloat16 or float32")
        return result

    def load(self, index: Index = ()) -> np.ndarray:
        """`read`, contiguous and in memory of its own."""
        array = contiguous(self.read(index))
        return array if array.flags.owndata else array.copy()

    def cast(self, dtype: str) -> Tensor:
        return replace(self, dtype=DTYPES[dtype])


def stored(file: Path | IO[bytes], offset: int, dtype: np.dtype, shape: tuple[int, ...], order: str = "C") -> Tensor:
    """The tensor that lies uncompressed in `file`, from byte `offset`, in C or Fortran order."""

    def raw(index: Index) -> np.ndarray:
        return np.asarray(np.memmap(file, dtype, "r", offset, shape, "F" if order == "F" else "C"))[index]

    return Tensor(shape, dtype, raw, columns=order == "F" and len(shape) == 2)


def from_array(array: Any, at: tuple[int, ...] = ()) -> Tensor:
    """array[at], in memory, as a Tensor (numpy's, or jax's: of which only the slices that are read come to the host)."""
    return Tensor(tuple(array.shape[len(at) :]), np.dtype(array.dtype), lambda index: np.asarray(array[(*at, *index)]))


def part(tensor: Tensor, position: tuple[int, ...]) -> Tensor:
    """tensor[position]: one layer of a stacked tensor, one half of a fused one."""
    return replace(tensor, shape=tensor.shape[len(position) :], columns=False, raw=lambda index: tensor.raw(())[position][index])


def relayout(tensor: Tensor, source: str, target: str, sizes: dict[str, int]) -> Tensor:
    """The same numbers in another layout (`convert.layout`)."""
    if source == target:
        return tensor
    columns = len(target.split()) == 2 and target.split() == source.split()[::-1] and not tensor.columns
    return replace(tensor, shape=layout_shape(target, sizes), columns=columns, raw=lambda index: reorder(tensor.raw(()), source, target, sizes)[index])


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of a table; rows that it lacks are the mean of those it has.

    The mean, so that a padding row can never have the largest logit; transformers' own converter draws such rows from a narrow normal
    distribution around it.
    """
    have, shape = tensor.shape[0], (rows, *tensor.shape[1:])
    if rows <= have:
        return replace(tensor, shape=shape, raw=lambda index: tensor.raw(())[:rows][index])
    mean: list[np.ndarray] = []

    def raw(index: Index) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(rows)
        real = tensor.raw((slice(start, min(stop, have)), *index[1:]))
        if stop <= have:
            return real
        if not mean:
            mean.append((np.sum([block.sum(0, np.float64) for block in blocks(tensor)], axis=0) / have).astype(real.dtype))
        fill = np.broadcast_to(mean[0], (stop - max(start, have), *mean[0].shape))[(slice(None), *index[1:])]
        return np.concatenate([real, fill])

    return replace(tensor, shape=shape, raw=raw)


def blocks(tensor: Tensor, columns: bool = False) -> Iterator[np.ndarray]:
    """The whole tensor in C order (with `columns`, its transpose), as contiguous arrays of about BLOCK bytes along the first axis."""
    length = tensor.shape[-1 if columns else 0]
    step = max(1, BLOCK * length // max(1, tensor.nbytes))
    before = (slice(None),) * (len(tensor.shape) - 1) if columns else ()
    for start in range(0, length, step):
        block = tensor.read((*before, slice(start, min(start + step, length))))
        yield contiguous(block.T if columns else block)


def equal(a: Tensor, b: Tensor) -> bool:
    """Are all bits the same?"""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(x.tobytes() == y.tobytes() for x, y in zip(blocks(a), blocks(b)))


class Job(NamedTuple):
    """Write `tensor` to `file` from byte `offset`; with `columns` its transpose."""

    path: str
    tensor: Tensor
    file: Path
    offset: int
    columns: bool = False


def write_tensors(jobs: Iterable[Job], progress: Progress) -> None:
    """Does all jobs, several files at once, each in order (two threads in one file only wait for each other).

    One block a thread is all that is in memory.
    """

    def one(file: Path, jobs: list[Job]) -> None:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as opened:
            for job in jobs:
                opened.seek(job.offset)
                for block in named(job.path, blocks(job.tensor, job.columns)):
                    rest = block.reshape(-1).view(np.uint8).data
                    while rest:
                        rest = rest[opened.write(rest) :]
                    progress(block.nbytes)

    files = {file: list(of_file) for file, of_file in groupby(jobs, key=lambda job: job.file)}
    pool = ThreadPoolExecutor(THREADS)
    try:
        for _ in pool.map(one, files.keys(), files.values()):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def named(path: str, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """`parts`, whose errors say which tensor they are about."""
    try:
        yield from parts
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def contiguous(view: np.ndarray) -> np.ndarray:
    """The same in C order: itself if it is, or a copy made in strips."""
    if view.flags.c_contiguous:
        return view
    result = np.empty(view.shape, view.dtype)
    bits = f"u{view.itemsize}"  # numpy moves integers faster than bfloat16
    source, target = view.view(bits), result.view(bits)
    for start in range(0, view.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]
    return result
