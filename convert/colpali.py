"""ColPali checkpoints: a PaliGemma and a projection of its hidden states.

They come from transformers (`ColPaliForRetrieval`, whose keys start with `vlm.`) and from
colpali-engine, whose config.json is that of a PaliGemma.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from convert import huggingface
from convert.checkpoint import Checkpoint
from convert.config import config_from_json, config_to_json, load_config
from convert.files import FileContent, atomic_output, copy_files, json_bytes
from convert.match import TensorEntry
from convert.tensor import Tensor, from_array, no_progress, run_jobs
from convert.typed_json import JsonObject, Positive, check, load_json
from convert.weight_files import SINGLE, load_headers
from paligemma_jax.model.config import PaliGemmaConfig

KEYS = ("embedding_proj_layer", "custom_text_proj")  # of transformers, of colpali-engine


class _Config(msgspec.Struct):
    vlm_config: JsonObject
    model_type: str = ""
    embedding_dim: Positive = 128


@dataclass(frozen=True)
class ColPaliCheckpoint:
    """An opened checkpoint: names, shapes and dtypes are checked; no tensor is read yet."""

    vlm: Checkpoint
    kernel: Tensor  # [E, D]
    bias: Tensor  # [E]


def is_colpali(directory: Path) -> bool:
    """Whether a directory contains a ColPali: its config.json says so, or it has a projection."""
    file = directory / "config.json"
    if not file.is_file():
        return False
    kind = load_json(file).get("model_type")
    return kind == "colpali" or (kind == "paligemma" and has_projection(_entries(directory)))


def has_projection(keys: Iterable[str]) -> bool:
    """Whether there is a projection, or a part of its update, among the keys of a file."""
    return any(name in key.split(".") for key in keys for name in KEYS)


def read(directory: Path) -> ColPaliCheckpoint:
    """Open a checkpoint.

    Raises:
        ValueError: It is not one, or a tensor is missing or has another shape or dtype.
    """
    content = load_json(directory / "config.json")
    size = None
    if content.get("model_type") == "paligemma":
        vlm_config = load_config(directory)
    else:
        config = check(content, _Config, f"{directory}/config.json")
        if config.model_type != "colpali":
            raise ValueError(
                f"{directory}: model_type in config.json must be 'colpali', "
                f"got {config.model_type!r}"
            )
        size = config.embedding_dim
        try:
            vlm_config = config_from_json(config.vlm_config)
        except ValueError as error:
            raise ValueError(f"{directory}: vlm_config in {error}") from None
    vlm = replace(huggingface.read(directory, vlm_config), notes=())
    entries = _entries(directory)
    bias = _find(directory, entries, "bias")
    kernel = _find(directory, entries, "weight")
    size = bias[1].shape[0] if size is None and bias[1].shape else size
    for (key, entry), shape in ((kernel, (size, vlm_config.decoder.hidden_size)), (bias, (size,))):
        if entry.shape != shape or entry.dtype not in huggingface.NAMES:
            raise ValueError(
                f"{directory}: {key} must be a float array {list(shape)}, "
                f"got {entry.dtype}{list(entry.shape)}"
            )
    return ColPaliCheckpoint(vlm, kernel[1].open(), bias[1].open())


def _entries(directory: Path) -> dict[str, TensorEntry]:
    headers = load_headers(directory)
    return {key: entry for header in headers.values() for key, entry in header.items()}


def _find(
    directory: Path, entries: Mapping[str, TensorEntry], name: str
) -> tuple[str, TensorEntry]:
    for prefix in KEYS:
        if f"{prefix}.{name}" in entries:
            return f"{prefix}.{name}", entries[f"{prefix}.{name}"]
    raise ValueError(
        f"{directory} has no {KEYS[0]}.{name}: a ColPali checkpoint needs its projection"
    )


def write(
    directory: Path,
    config: PaliGemmaConfig,
    parameters: Mapping[str, np.ndarray],
    kernel: np.ndarray,
    bias: np.ndarray,
    files: Mapping[str, FileContent],
    force: bool = False,
) -> None:
    """Write a directory that transformers' `ColPaliForRetrieval` loads.

    Args:
        parameters: Those of the PaliGemma by path.
        kernel: float[E, D], the projection.
        bias: float[E]
        files: Tokenizer and processor files by name.
    """
    tensors = {path: from_array(array) for path, array in parameters.items()}
    contents = {
        f"vlm.{key}": pair for key, pair in huggingface.file_tensors(config, tensors).items()
    }
    contents[f"{KEYS[0]}.weight"] = KEYS[0], from_array(kernel)
    contents[f"{KEYS[0]}.bias"] = KEYS[0], from_array(bias)
    dtype = kernel.dtype.name
    description = {
        "architectures": ["ColPaliForRetrieval"],
        "model_type": "colpali",
        "embedding_dim": len(bias),
        "torch_dtype": dtype,
        "vlm_config": config_to_json(config, dtype),
    }
    with atomic_output(directory, force) as new:
        new.mkdir()
        run_jobs(huggingface.start_file(new / SINGLE, contents), no_progress)
        copy_files(new, {**files, "config.json": json_bytes(description)})
