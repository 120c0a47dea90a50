"""Weights quantized by bitsandbytes, as transformers saves them in safetensors.

nf4: beside each `weight`, `weight.absmax`, `weight.quant_map` and JSON in the bytes of
`weight.quant_state.bitsandbytes__nf4`; with quantized scales also `weight.nested_absmax` and
`weight.nested_quant_map`. int8: `SCB`, the largest magnitude of each row, and `weight_format`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from convert.match import TensorEntry, Weight
from convert.quantized import quantizable_matrices
from convert.tensor import DTYPES, Index, Tensor
from convert.typed_json import JsonObject
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import WeightFormat

STATE = ".quant_state.bitsandbytes__"
UNSUPPORTED = "is not a supported bitsandbytes tensor"


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
        ValueError: A format is not supported (fp4, larger blocks, codes in another dtype), or
            tensors do not fit together.
    """
    packed, consumed = {}, set()
    for key in entries:
        try:
            if STATE in key:
                weight = key.partition(STATE)[0]
                state = json.loads(bytes(_load(entries[key])))
                packed[weight] = _unpack_nf4(weight, state, entries)
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
        if not format.fits(matrix.shape):
            odd = f"{weight.key} {list(matrix.shape)} has an odd last axis"
            raise ValueError(f"{odd}, so its codes cannot be paired")
        del tensors[weight.path]
        formats[matrix.module] = format
        for name, (shape, dtype) in matrix.parts(format).items():
            tensors[f"{matrix.module}/{name}"] = _tensor(parts[name], shape, dtype)
    return formats


def _unpack_nf4(weight: str, state: JsonObject, entries: Mapping[str, TensorEntry]) -> PackedMatrix:
    from paligemma_jax.model.codes import NESTED_BLOCK, NF4, dynamic_map

    shape, double = tuple(map(int, state["shape"])), "nested_offset" in state
    format = WeightFormat(str(state["quant_type"]), int(state["blocksize"]), double=double)
    size = math.prod(shape)
    if size % format.block:
        raise ValueError(f"blocks of {format.block} do not divide {list(shape)}")
    blocks = size // format.block
    expected = {"": ("U8", size // 2), ".quant_map": ("F32", 16)}
    expected[".absmax"] = ("U8" if double else "F32", blocks)
    if double:
        expected[".nested_absmax"] = ("F32", -(-blocks // NESTED_BLOCK))
        expected[".nested_quant_map"] = ("F32", 256)
    for name, (dtype, count) in expected.items():
        entry = entries[weight + name]
        if (entry.dtype, math.prod(entry.shape)) != (dtype, count):
            actual = f"{weight + name} is {entry.dtype} {list(entry.shape)}"
            raise ValueError(f"{actual}, but {list(shape)} in {format} needs {count} of {dtype}")

    def load(name: str) -> np.ndarray:
        return _load(entries[weight + name]).reshape(-1)

    if format.kind != "nf4" or (load(".quant_map") != NF4).any():
        raise ValueError("its 16 values differ from those of nf4")
    parts = {"codes": lambda: load(""), "scale": lambda: load(".absmax")}
    if double:
        offset = np.float32(state["nested_offset"])
        parts["nested"] = lambda: np.append(offset, load(".nested_absmax"))
        values, block = load(".nested_quant_map"), int(state["nested_blocksize"])
        if block != NESTED_BLOCK or (values != dynamic_map()).any():
            raise ValueError("the values of its scales differ from those of bitsandbytes")
    return PackedMatrix(format, shape, parts)


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
