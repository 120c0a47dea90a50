"""Read adapters of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from convert.adapter import Adapter, Factors
from convert.huggingface import canonical_name
from convert.layout import layout_shape, reorder
from convert.match import TensorEntry, Weight, huggingface_weights
from convert.peft_config import (
    MERGE,
    PREFIX_TUNING,
    AdapterConfig,
    PromptConfig,
    load_adapter_config,
    scales,
)
from convert.peft_names import (
    CONFIG,
    MAGNITUDE,
    SOFT_PROMPT,
    WEIGHTS,
    A,
    B,
    part_layouts,
    peft_name,
    split_key,
)
from convert.peft_save import save_adapter
from convert.safetensors import NAMES, load_header
from convert.table import HEAD, HEAD_PATH, TABLE, TABLE_PATH
from convert.tensor import Tensor, equal
from convert.typed_json import describe, load_json
from paligemma_jax.model.config import PaliGemmaConfig

__all__ = ["Factors", "base_checkpoint", "is_adapter", "load_adapter", "read", "save_adapter"]

Parts = dict[str, np.ndarray]  # of the update of a layer
UNSUPPORTED = {
    r"\.lora_embedding_[AB]|embed_tokens\.base_layer": "LoRA of an embedding table",
    r"lm_head\.(lora_|base_layer)": "LoRA of the head",
}


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def base_checkpoint(directory: Path) -> str:
    """The base checkpoint named in the config of an adapter. Raises ValueError if there is none."""
    file = directory / CONFIG
    name = load_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        found = f"base_model_name_or_path must name the base checkpoint, got {describe(name)}"
        raise ValueError(f"{file}: {found}; give the base with --base")
    return name


def load_adapter(directory: Path, config: PaliGemmaConfig) -> dict[str, Factors]:
    """The factors of an adapter by the path of the layer, as in "decoder/layers/3/attention/q".

    Raises:
        ValueError: As in `read`, or if the adapter has more than factors.
    """
    adapter = read(directory, config)
    if adapter.parameters:
        raise ValueError(f"{directory} has modules_to_save; use convert.peft.read")
    if adapter.soft_tokens:
        raise ValueError(f"{directory} has a {adapter.soft_kind}; use convert.peft.read")
    return adapter.factors


def read(directory: Path, config: PaliGemmaConfig, more: Iterable[Weight] = ()) -> Adapter:
    """Read an adapter of a model with this config.

    Args:
        more: Parameters that the model has besides those of a PaliGemma.

    Raises:
        ValueError: The adapter does not fit the model, or has settings that are not supported. All
            tensors that do not fit are listed.
    """
    settings, file = load_adapter_config(directory), weight_file(directory)
    if isinstance(settings, PromptConfig):
        count, decoder = settings.num_virtual_tokens, config.decoder
        if settings.peft_type != PREFIX_TUNING:
            return Adapter({}, soft_prompt=_read_prompt(file, decoder.hidden_size, count))
        vectors = _read_prompt(file, math.prod(decoder.prefix_shape), count)
        return Adapter({}, prefix=vectors.reshape(count, *decoder.prefix_shape))
    weights = _weights(config) | {weight.key: weight for weight in more}
    names: dict[str, str] = {}  # of the layers in the file, by path
    updates: dict[str, Parts] = {}
    parameters: dict[str, Tensor] = {}
    errors = []
    header = load_header(file)
    has_prompt = header.pop(SOFT_PROMPT, None) is not None
    for key, entry in header.items():
        name, part = split_key(key)
        weight = weights.get(canonical_name(f"{name}.weight" if part else name))
        unsupported = _unsupported(key)
        if unsupported:
            raise ValueError(f"{file}: {unsupported} ({key}) is not supported; {MERGE}")
        if weight is None or not (part or _is_saved(name, settings)):
            errors.append(f"unknown key {key}")
        elif not _fits(entry, weight, part):
            found = f"{key} is {entry.dtype} {list(entry.shape)}"
            shape = list(weight.file_shape)
            errors.append(f"{found}, which does not fit {weight.path} {shape}")
        elif part is None:
            parameters[weight.path] = weight.from_file(entry.open())
        else:
            layer = weight.path.removesuffix("/kernel")
            names[layer] = name
            updates.setdefault(layer, {})[part] = _load_part(entry, weight, part)
    errors += _incomplete(settings, weights, updates, parameters)
    if errors:
        count = f" (errors: {len(errors)})" if len(errors) > 5 else ""
        raise ValueError(f"{file} does not fit the model: {'; '.join(errors[:5])}{count}")
    ranks = {names[layer]: len(parts[A]) for layer, parts in updates.items()}
    scale = scales(settings, ranks, directory / CONFIG)
    factors = {
        layer: Factors(parts[A], parts[B], scale[names[layer]], parts.get(MAGNITUDE))
        for layer, parts in updates.items()
    }
    if config.decoder.tie_word_embeddings:
        parameters = _tie(parameters, file)
    D = config.decoder.hidden_size
    return Adapter(factors, parameters, _read_prompt(file, D) if has_prompt else None)


def _read_prompt(file: Path, D: int, count: int | None = None) -> np.ndarray:
    """The vectors in the weights of an adapter, float32[N, D]; N is `count`, if given."""
    header = load_header(file)
    entry = header.get(SOFT_PROMPT)
    if entry is None or (count and len(header) > 1):
        raise ValueError(f"{file} must have {SOFT_PROMPT} alone, got {', '.join(header) or 'none'}")
    N = count or (entry.shape[0] if entry.shape else 0)
    if entry.dtype not in NAMES or entry.shape != (N, D) or not N:
        raise ValueError(
            f"{file}: {SOFT_PROMPT} must be a float of shape {[N, D]}, "
            f"got {entry.dtype} {list(entry.shape)}"
        )
    return entry.open().numpy().astype(np.float32)


def _weights(config: PaliGemmaConfig) -> dict[str, Weight]:
    """Every parameter by its released name, and the head, even if it is tied to the table."""
    weights = {weight.key: weight for weight in huggingface_weights(config)}
    return weights | {HEAD: weights[TABLE]._replace(key=HEAD, path=HEAD_PATH)}


def _unsupported(key: str) -> str | None:
    """What a tensor is for, if that is not supported."""
    return next((what for pattern, what in UNSUPPORTED.items() if re.search(pattern, key)), None)


def _tie(parameters: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The parameters without a head that equals the new table, to which it stays tied."""
    table, head = parameters.get(TABLE_PATH), parameters.get(HEAD_PATH)
    if (table is None) != (head is None) or (table and head and not equal(table, head)):
        raise ValueError(
            f"{file} unties the head from the embedding table (modules_to_save has only one of "
            f"them, or they differ), which is not supported; {MERGE}"
        )
    return {path: tensor for path, tensor in parameters.items() if path != HEAD_PATH}


def weight_file(directory: Path) -> Path:
    """The weights of an adapter. Raises ValueError if there are none in safetensors."""
    file = directory / WEIGHTS
    if not file.is_file():
        is_pickle = (directory / "adapter_model.bin").exists()
        hint = "; save it with safe_serialization=True (pickled weights are never opened)"
        raise ValueError(f"{directory} has no {WEIGHTS}{hint if is_pickle else ''}")
    return file


def _part_sizes(entry: TensorEntry, weight: Weight, part: str) -> dict[str, int]:
    """The size of every axis letter of a part, the rank R included."""
    layout, _ = part_layouts(weight)[part]
    return dict(zip(layout.split(), entry.shape, strict=False)) | weight.sizes


def _fits(entry: TensorEntry, weight: Weight, part: str | None) -> bool:
    """Whether a tensor has the dtype and shape of a parameter, or of a part of its update."""
    if entry.dtype not in NAMES or 0 in entry.shape:
        return False
    if part is None:
        return entry.shape == weight.file_shape
    if not weight.path.endswith("/kernel"):  # only linear layers have updates
        return False
    layout, _ = part_layouts(weight)[part]
    if len(entry.shape) != len(layout.split()):
        return False
    return entry.shape == layout_shape(layout, _part_sizes(entry, weight, part))


def _load_part(entry: TensorEntry, weight: Weight, part: str) -> np.ndarray:
    """A part of an update, in float32 and the layout of the model."""
    sizes = _part_sizes(entry, weight, part)
    return reorder(entry.open().load().astype(np.float32), *part_layouts(weight)[part], sizes)


def _is_saved(name: str, settings: AdapterConfig) -> bool:
    """Whether `modules_to_save` has a module with this parameter. By peft's rule, an entry is the
    end of the name of a module."""
    endings = tuple(settings.modules_to_save or ())
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(endings) for i in range(1, len(parts)))


def _incomplete(
    settings: AdapterConfig,
    weights: Mapping[str, Weight],
    updates: Mapping[str, Parts],
    parameters: Mapping[str, Tensor],
) -> list[str]:
    """What the weights lack according to the settings."""
    errors = []
    needed = {A, B, MAGNITUDE} if settings.use_dora else {A, B}
    for layer, parts in updates.items():
        if parts.keys() != needed or len(parts[A]) != parts[B].shape[-1]:
            magnitude = f", and a {MAGNITUDE}" if settings.use_dora else ""
            errors.append(f"{layer} needs {A} and {B} of the same rank{magnitude}")
    for key, weight in weights.items():
        is_saved = _is_saved(key, settings) or _is_saved(peft_name(key), settings)
        if is_saved and weight.path not in parameters:
            errors.append(f"{peft_name(key)}, which is in modules_to_save, is missing")
    return errors if errors or updates or parameters else ["it is empty"]
