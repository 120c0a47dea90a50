"""What bitsandbytes quantized, as transformers saves it in safetensors: nf4 (with quantized scales too) and int8 (LLM.int8's weights).

Beside each `weight`: `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON in bytes), for quantized scales
`weight.nested_absmax` and `weight.nested_quant_map`; for int8 `SCB`, the largest magnitude of each row, and `weight_format`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.match import Entry, Piece
from convert.quantized import part_shapes, quantizable_matrices
from convert.tensor import INTEGERS, Index, Tensor
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import WeightFormat

STATE = ".quant_state.bitsandbytes__"


class Packed(NamedTuple):
    """A matrix as bitsandbytes holds it: its parts, in the order of memory, under the names of `paligemma_jax/model/codes.py`."""

    format: WeightFormat
    shape: tuple[int, ...]
    parts: dict[str, Callable[[], np.ndarray]]


def unpack(entries: Mapping[str, Entry], where: object) -> tuple[dict[str, Entry], dict[str, Packed]]:
    """The entries with one for each quantized weight, of the shape and dtype that it has when whole, and how each is held.

    ValueError for other formats of bitsandbytes (fp4, larger blocks, codes that are stored as another dtype) and for what does not fit together.
    """
    found, beside = {}, set()
    for key in entries:
        try:
            if STATE in key:
                weight = key.partition(STATE)[0]
                found[weight] = _four_bits(weight, json.loads(bytes(_array(entries, key))), entries)
                beside |= {other for other in entries if other.startswith(weight + ".")}
            elif key.endswith(".SCB"):
                weight = key.removesuffix("SCB") + "weight"
                found[weight] = _int8(weight, key, entries)
                beside |= {key, weight + "_format"}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{where}: {key} is none of bitsandbytes' that can be read here: {reason}") from None
    whole = {key: Entry("F32", packed.shape, lambda packed=packed: _whole(packed)) for key, packed in found.items()}
    return {key: whole.get(key, entry) for key, entry in entries.items() if key not in beside}, found


def put(tensors: dict[str, Tensor], found: Iterable[Piece], packed: Mapping[str, Packed], config: PaliGemmaConfig) -> dict[str, WeightFormat]:
    """Puts the parts of each packed matrix in its place among `tensors`; returns the formats by path. Our axes are torch's [out, in], split."""
    known, formats = quantizable_matrices(config), {}
    for piece in found:
        if piece.key not in packed:
            continue
        matrix, (format, _, parts) = known[piece.path], packed[piece.key]
        if not format.fits(matrix.shape):
            raise ValueError(f"{piece.key} {list(matrix.shape)} has an odd last axis, whose codes do not lie in pairs")
        del tensors[piece.path]
        formats[matrix.where] = format
        for name, (of, dtype) in part_shapes(format, matrix.shape, matrix.contracted).items():
            tensors[f"{matrix.where}/{name}"] = _tensor(parts[name], of, dtype)
    return formats


def _four_bits(weight: str, state: dict[str, Any], entries: Mapping[str, Entry]) -> Packed:
    from paligemma_jax.model.codes import NESTED_BLOCK, NF4, dynamic_map

    shape, double = tuple(map(int, state["shape"])), "nested_offset" in state
    format = WeightFormat(str(state["quant_type"]), int(state["blocksize"]), double=double)
    blocks, numbers = math.prod(shape) // format.block, math.prod(shape)
    wanted = {"": ("U8", numbers // 2), ".absmax": ("U8" if double else "F32", blocks), ".quant_map": ("F32", 16)}
    wanted |= {".nested_absmax": ("F32", -(-blocks // NESTED_BLOCK)), ".nested_quant_map": ("F32", 256)} if double else {}
    if numbers % format.block:
        raise ValueError(f"blocks of {format.block} do not divide {list(shape)}")
    for name, (dtype, size) in wanted.items():
        entry = entries[weight + name]
        if (entry.dtype, math.prod(entry.shape)) != (dtype, size):
            raise ValueError(f"{weight + name} is {entry.dtype} {list(entry.shape)}, where {size} of {dtype} make {list(shape)}, {format}")
    of = lambda name: _array(entries, weight + name).reshape(-1)
    if format.kind != "nf4" or (of(".quant_map") != NF4).any():
        raise ValueError("its 16 values are not those of nf4")
    if double and (int(state["nested_blocksize"]) != NESTED_BLOCK or (of(".nested_quant_map") != dynamic_map()).any()):
        raise ValueError("the values of its scales are not bitsandbytes' own")
    parts = {"codes": lambda: of(""), "scale": lambda: of(".absmax")}
    parts |= {"nested": lambda: np.append(np.float32(state["nested_offset"]), of(".nested_absmax"))} if double else {}
    return Packed(format, shape, parts)


def _int8(weight: str, key: str, entries: Mapping[str, Entry]) -> Packed:
    codes, largest = entries[weight], entries[key]
    if codes.dtype != "I8" or largest.dtype != "F32" or len(codes.shape) != 2 or largest.shape != codes.shape[:1]:
        raise ValueError(f"{codes.dtype} {list(codes.shape)} by {largest.dtype} {list(largest.shape)}; int8 has one F32 for each row of I8")
    if weight + "_format" in entries and _array(entries, weight + "_format").any():
        raise ValueError("its rows are not in their order (weight_format)")
    return Packed(WeightFormat("int8"), codes.shape, {"codes": lambda: _array(entries, weight), "scale": lambda: _array(entries, key) / np.float32(127)})


def _array(entries: Mapping[str, Entry], key: str) -> np.ndarray:
    return entries[key].tensor().load()


def _whole(packed: Packed) -> Tensor:
    """Never read: its shape is what is looked at."""
    return _tensor(packed.parts["codes"], packed.shape, "float32")


def _tensor(part: Callable[[], np.ndarray], of: tuple[int, ...], dtype: str) -> Tensor:
    def raw(index: Index) -> np.ndarray:
        return part().reshape(of)[index]

    return Tensor(of, INTEGERS.get(dtype, np.dtype("float32")), raw)
