"""The weight files of a Hugging Face directory, and directories that other programs wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from convert.config_fields import unsupported
from convert.match import TensorEntry
from convert.safetensors import load_header
from convert.typed_json import JsonObject, describe, load_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Weight files of other programs, and the way out.
_OTHER_FILES = {
    "pytorch_model*.bin": "which is a pickle and is never read; load it with transformers and save "
    "it again: save_pretrained writes safetensors",
    "*.gguf": "a format of llama.cpp; use the Hugging Face checkpoint it was made from",
    "model-*.safetensors": f"but no {INDEX}; download the index too",
    "adapter_model.*": "the weights of an adapter without its adapter_config.json",
}
# Quantized weights of other programs: what a key or a dtype looks like, and who made it.
_OTHER_WEIGHTS = {
    r".*\.(qweight|qzeros|g_idx) .*": "GPTQ or AWQ",
    r".*\.weight_(packed|shape|zero_point) .*": "compressed-tensors",
    r".*\.(scales|biases) .*": "MLX",
    r".*\.(weight_scale(_inv)?|input_scale) .*|.* F8_.*": "fp8",
}


class Index(Struct):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]
    metadata: JsonObject | None = None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: as in transformers, model.safetensors where it exists,
    or those that the index lists.

    Raises:
        ValueError: There are none, or some are missing.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        for pattern, reason in _OTHER_FILES.items():
            others = sorted(directory.glob(pattern))
            if others:
                raise ValueError(f"{directory} has {others[0].name}, {reason}")
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
    names = sorted(set(load_json(index, Index).weight_map.values()))
    if not names:
        raise ValueError(f"{index} has an empty weight_map; download it again")
    check_names(names, index)
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        listed = f"{', '.join(missing)} (listed in {INDEX})"
        raise ValueError(f"{directory}: {listed} is missing; download it again")
    return [directory / name for name in names]


def load_headers(directory: Path) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each weight file by key, by the name of the file.

    Raises:
        ValueError: A header is malformed, a tensor is in two files, or the weights are quantized by
            a program whose formats are not supported.
    """
    headers = {file.name: load_header(file) for file in weight_files(directory)}
    first: dict[str, str] = {}
    for name, header in headers.items():
        for key, entry in header.items():
            if key in first:
                both = f"{first[key]} and {name}"
                raise ValueError(f"{directory}: {key} is in both {both}; download them again")
            first[key] = name
            for pattern, program in _OTHER_WEIGHTS.items():
                if re.fullmatch(pattern, f"{key} {entry.dtype}"):
                    raise ValueError(f"{directory}: {key} {unsupported(program)}")
    return headers


def check_names(names: Iterable[str], source: object) -> None:
    """Raise ValueError unless all are safetensors files of one directory: "../x.safetensors" is
    neither opened nor written."""
    outside = [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]
    if outside:
        listed = ", ".join(map(describe, outside))
        own = "must name .safetensors files of its own directory"
        raise ValueError(f"{source} {own}, got {listed}")
