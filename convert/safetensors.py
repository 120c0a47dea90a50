"""The safetensors file format: 8 bytes of header length, the header in JSON, the data. Headers only: data is mapped, and written in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import JSON_LIMIT
from convert.match import Entry
from convert.tensor import DTYPES, INTEGERS, stored

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
STORED = {name: DTYPES[dtype] for name, dtype in NAMES.items()} | {"U8": INTEGERS["uint8"], "I8": INTEGERS["int8"]}
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
_SIZES |= {name: DTYPES[dtype].itemsize for name, dtype in NAMES.items()}


def read_header(file: Path) -> dict[str, Entry]:
    """key -> Entry, in the order of the data. ValueError if the header is not sound, or does not account for every byte of the file."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, JSON_LIMIT):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))
        return _entries(file, header, 8 + length, size)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}); download it again") from None


def _entries(file: Path, header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    entries, position = {}, start
    for key, value in header.items():
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if any(type(n) is not int or not 0 <= n < 2**48 for n in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError(f"{key} has no sound shape and offsets")
        nbytes = int(np.prod(shape, dtype=object)) * _SIZES[dtype]
        if start + begin != position or end - begin != nbytes:
            raise ValueError(f"{key} lies at bytes {begin} to {end}, where {position - start} to {position - start + nbytes} are its own")
        entries[key] = Entry(dtype, shape, lambda dtype=dtype, at=position, shape=shape: stored(file, at, STORED[dtype], shape))
        position += nbytes
    if position != size:
        raise ValueError(f"its header accounts for {position} bytes, the file has {size}")
    return entries


def make_header(tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds these tensors in this order, and where in the file each begins."""
    names = {dtype: name for name, dtype in NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses the file
    offsets, position = {}, 0
    for key, (dtype, shape) in tensors.items():
        offsets[key], end = position, position + int(np.prod(shape)) * dtype.itemsize
        header[key] = {"dtype": names[dtype.name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {key: 8 + len(text) + offset for key, offset in offsets.items()}
