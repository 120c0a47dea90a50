"""ColPali checkpoints of transformers (`ColPaliForRetrieval`): a PaliGemma whose keys start with
`vlm.`, and a projection of its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from convert import huggingface
from convert.checkpoint import Checkpoint
from convert.config import config_from_json, config_to_json
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
    """Whether a directory has a config.json of a ColPali."""
    file = directory / "config.json"
    return file.is_file() and load_json(file).get("model_type") == "colpali"


def read(directory: Path) -> ColPaliCheckpoint:
    """Open a checkpoint.

    Raises:
        ValueError: It is not one, or a tensor is missing or has another shape or dtype.
    """
    config = check(load_json(directory / "config.json"), _Config, f"{directory}/config.json")
    if config.model_type != "colpali":
        raise ValueError(
            f"{directory}: model_type in config.json must be 'colpali', got {config.model_type!r}"
        )
    try:
        vlm_config = config_from_json(config.vlm_config)
    except ValueError as error:
        raise ValueError(f"{directory}: vlm_config in {error}") from None
    vlm = replace(huggingface.read(directory, vlm_config), notes=())
    headers = load_headers(directory)
    entries = {key: entry for header in headers.values() for key, entry in header.items()}
    shapes = {
        "weight": (config.embedding_dim, vlm_config.decoder.hidden_size),
        "bias": (config.embedding_dim,),
    }
    kernel, bias = (_find(directory, entries, name, shape) for name, shape in shapes.items())
    return ColPaliCheckpoint(vlm, kernel, bias)


def _find(
    directory: Path, entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, ...]
) -> Tensor:
    keys = [key for prefix in KEYS for key in (f"{prefix}.{name}",) if key in entries]
    if not keys:
        raise ValueError(
            f"{directory} has no {KEYS[0]}.{name}: a ColPali checkpoint needs its projection"
        )
    entry = entries[keys[0]]
    if entry.shape != shape or entry.dtype not in huggingface.NAMES:
        raise ValueError(
            f"{directory}: {keys[0]} must be a float array {list(shape)}, "
            f"got {entry.dtype}{list(entry.shape)}"
        )
    return entry.open()


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
