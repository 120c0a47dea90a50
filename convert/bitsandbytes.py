"""Weights quantized by bitsandbytes, as transformers saves them in safetensors.

nf4 and fp4: beside each `weight`, `weight.absmax`, `weight.quant_map` and JSON in the bytes of
`weight.quant_state.bitsandbytes__nf4`; with quantized scales also `weight.nested_absmax` and
`weight.nested_quant_map`. int8: `SCB`, the largest magnitude of each row, and `weight_format`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from convert.match import TensorEntry, Weight
from convert.quantized import quantizable_matrices
from convert.tensor import DTYPES, Index, Tensor
from convert.typed_json import Positive, decode
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import WeightFormat

STATE = ".quant_state.bitsandbytes__"
UNSUPPORTED = "is not a supported bitsandbytes tensor"
STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}  # bytes of the dtypes of 4-bit codes


class QuantState(Struct):
    """The JSON beside a 4-bit weight."""

    quant_type: str
    blocksize: Positive
    shape: Annotated[tuple[Positive, ...], Meta(max_length=8)]
    nested_blocksize: Positive = 256
    nested_offset: float | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class PackedMatrix(NamedTuple):
    """A quantized matrix [out, in], with the parts of `paligemma_jax/model/codes.py` by name."""

    format: WeightFormat
    shape: tuple[int, ...]
    parts: dict[str, Callable[[], np.ndarray]]


def unpack(
    entries: Mapping[str, TensorEntry], source: object
) -> tuple[dict[str, TensorEntry], dict[str, PackedMatrix]]:
    """Find the quantized matrices among the tensors of a file.

    Returns:
        The entries with every quantized matrix as one float32 tensor (whose values are not read),
        and the quantized matrices by key.

    Raises:
        ValueError: A format is not supported (larger blocks), or tensors do not fit together.
    """
    packed, consumed = {}, set()
    for key in entries:
        try:
            if STATE in key:
                weight = key.partition(STATE)[0]
                state = decode(bytes(_load(entries[key])), QuantState, "its state")
                packed[weight] = _unpack_4bit(weight, state, entries)
                consumed |= {other for other in entries if other.startswith(weight + ".")}
            elif key.endswith(".SCB"):
                weight = key.removesuffix("SCB") + "weight"
                packed[weight] = _unpack_int8(weight, key, entries)
                consumed |= {key, weight + "_format"}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{source}: {key} {UNSUPPORTED}: {reason}") from None
    dense = {
        key: TensorEntry("F32", matrix.shape, partial(_tensor, matrix.parts["codes"], matrix.shape))
        for key, matrix in packed.items()
    }
    kept = {key: entry for key, entry in entries.items() if key not in consumed}
    return {key: dense.get(key, entry) for key, entry in kept.items()}, packed


def insert(
    tensors: dict[str, Tensor],
    weights: Iterable[Weight],
    packed: Mapping[str, PackedMatrix],
    config: PaliGemmaConfig,
) -> dict[str, WeightFormat]:
    """Replace the quantized matrices in `tensors` by their parts; returns the formats by path.

    The model's axes are those of torch, [out, in], split by heads.
    """
    matrices, formats = quantizable_matrices(config), {}
    for weight in weights:
        if weight.key not in packed:
            continue
        matrix, (format, _, parts) = matrices[weight.path], packed[weight.key]
        if not matrix.fits(format):
            reason = "its rows cannot be divided into blocks, or pairs of codes"
            raise ValueError(f"{weight.key} {list(matrix.shape)} cannot be {format}: {reason}")
        del tensors[weight.path]
        formats[matrix.module] = format
        for name, (shape, dtype) in matrix.parts(format).items():
            tensors[f"{matrix.module}/{name}"] = _tensor(parts[name], shape, dtype)
    return formats


def _unpack_4bit(
    weight: str, state: QuantState, entries: Mapping[str, TensorEntry]
) -> PackedMatrix:
    from paligemma_jax.model.codes import NESTED_BLOCK, TABLES, dynamic_map

    if state.quant_type not in TABLES:
        raise ValueError(f"quant_type must be nf4 or fp4, got {state.quant_type!r}")
    format, shape, size = WeightFormat(state.quant_type, state.blocksize), state.shape, state.size
    table = TABLES[format.kind]
    if size % format.block:
        raise ValueError(f"blocks of {format.block} do not divide {list(shape)}")
    _check_tensors(weight, state, entries)

    def load(name: str) -> np.ndarray:
        return _load(entries[weight + name]).reshape(-1)

    if (load(".quant_map") != table).any():
        raise ValueError(f"its 16 values differ from those of {format.kind}")
    parts = {"codes": lambda: load("").view(np.uint8), "scale": lambda: load(".absmax")}
    if state.nested_offset is None:
        return PackedMatrix(format, shape, parts)
    offset, values = np.float32(state.nested_offset), load(".nested_quant_map")
    if state.nested_blocksize == NESTED_BLOCK and (values == dynamic_map()).all():
        parts["nested"] = lambda: np.append(offset, load(".nested_absmax"))
        return PackedMatrix(replace(format, double=True), shape, parts)

    def scales() -> np.ndarray:  # of other values, such as those of bitsandbytes 0.49 on a CPU
        codes = load(".absmax")
        largest = np.repeat(load(".nested_absmax"), state.nested_blocksize)[: len(codes)]
        return values[codes] * largest + offset

    return PackedMatrix(format, shape, parts | {"scale": scales})


def _check_tensors(weight: str, state: QuantState, entries: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError unless the tensors beside a 4-bit weight have the right dtypes and sizes.

    The codes may have any dtype (`bnb_4bit_quant_storage`): their bytes are the same.
    """
    blocks, codes = state.size // state.blocksize, entries[weight]
    expected = {".quant_map": ("F32", 16), ".absmax": ("F32", blocks)}
    if state.nested_offset is not None:
        expected[".absmax"] = ("U8", blocks)
        expected[".nested_absmax"] = ("F32", -(-blocks // state.nested_blocksize))
        expected[".nested_quant_map"] = ("F32", 256)
    if codes.dtype in STORAGE:
        expected[""] = (codes.dtype, state.size // 2 // STORAGE[codes.dtype])
    else:
        expected[""] = ("U8", state.size // 2)
    for name, (dtype, count) in expected.items():
        entry = entries[weight + name]
        if (entry.dtype, math.prod(entry.shape)) != (dtype, count):
            actual = f"{weight + name} is {entry.dtype} {list(entry.shape)}"
            needed = f"{list(state.shape)} in blocks of {state.blocksize} needs {count} of {dtype}"
            raise ValueError(f"{actual}, but {needed}")


def _unpack_int8(weight: str, scale: str, entries: Mapping[str, TensorEntry]) -> PackedMatrix:
    codes, largest = entries[weight], entries[scale]
    is_matrix = len(codes.shape) == 2 and largest.shape == codes.shape[:1]
    if (codes.dtype, largest.dtype) != ("I8", "F32") or not is_matrix:
        actual = f"{codes.dtype} {list(codes.shape)} and {largest.dtype} {list(largest.shape)}"
        raise ValueError(f"int8 needs a matrix of I8 and one F32 for each row, got {actual}")
    order = entries.get(weight + "_format")
    if order and _load(order).any():
        raise ValueError("its rows are reordered (weight_format)")
    parts = {"codes": partial(_load, codes), "scale": lambda: _load(largest) / np.float32(127)}
    return PackedMatrix(WeightFormat("int8"), codes.shape, parts)


def _load(entry: TensorEntry) -> np.ndarray:
    return entry.open().load()


def _tensor(
    load: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: np.dtype = DTYPES["float32"]
) -> Tensor:
    def raw(index: Index) -> np.ndarray:
        return load().reshape(shape)[index]

    return Tensor(shape, dtype, raw)
