"""The safetensors file format: 8 bytes of header length, a header in JSON, the data. Only headers
are handled here: data is memory-mapped, and written in place."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from convert.match import TensorEntry
from convert.tensor import DTYPES, INTEGERS, map_file
from convert.typed_json import JSON_LIMIT, Count, JsonObject, decode

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPES = {name: DTYPES[dtype] for name, dtype in NAMES.items()}
_DTYPES |= {"U8": INTEGERS["uint8"], "I8": INTEGERS["int8"]}
_SIZES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}


class _Header(Struct):
    """A tensor in the header. `__metadata__` has none of these fields."""

    dtype: str = ""
    shape: Annotated[list[Count], Meta(max_length=8)] = []
    data_offsets: tuple[Count, Count] = (0, 0)


def load_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by key, in the order of the data.

    Raises:
        ValueError: If the header is malformed, or does not account for every byte of the file.
    """
    try:
        with file.open("rb") as source:
            size = source.seek(0, 2)
            source.seek(0)
            length = int.from_bytes(source.read(8), "little")
            if size < 8 or length > min(size - 8, JSON_LIMIT):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = decode(source.read(length), dict[str, _Header])
        header.pop("__metadata__", None)
        header = dict(sorted(header.items(), key=lambda item: item[1].data_offsets))
        return _entries(file, header, 8 + length, size)
    except (OSError, ValueError) as error:
        malformed = f"{file} is truncated or not a safetensors file ({error})"
        raise ValueError(f"{malformed}; download it again") from None


def _entries(
    file: Path, header: dict[str, _Header], start: int, size: int
) -> dict[str, TensorEntry]:
    entries, position = {}, start
    for key, value in header.items():
        dtype, shape, (begin, end) = value.dtype, tuple(value.shape), value.data_offsets
        if dtype not in _SIZES:
            raise ValueError(f"{key} must have one of the dtypes {', '.join(_SIZES)}, got {dtype}")
        nbytes = math.prod(shape) * _SIZES[dtype]
        if start + begin != position or end - begin != nbytes:
            expected = f"{position - start} to {position - start + nbytes}"
            raise ValueError(f"{key} is at bytes {begin} to {end}, expected {expected}")
        load = partial(_open, file, position, dtype, shape)
        entries[key] = TensorEntry(dtype, shape, load)
        position += nbytes
    if position != size:
        raise ValueError(f"the header accounts for {position} bytes, but the file has {size}")
    return entries


def _open(file: Path, position: int, dtype: str, shape: tuple[int, ...]):
    return map_file(file, position, _DTYPES[dtype], shape)


def make_header(
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors (dtype, shape), and the offset of each in it."""
    names = {dtype: name for name, dtype in NAMES.items()}
    header: JsonObject = {"__metadata__": {"format": "pt"}}  # which transformers requires
    position = 0
    for key, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        offsets = [position, end]
        header[key] = {"dtype": names[dtype.name], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first, start = len(text).to_bytes(8, "little") + text, 8 + len(text)
    return first, {key: start + header[key]["data_offsets"][0] for key in tensors}
