"""Read adapters of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.adapter import Adapter, Factors
from convert.huggingface import canonical_name
from convert.layout import layout_shape, reorder
from convert.match import TensorEntry, Weight, huggingface_weights
from convert.peft_config import AdapterConfig, load_adapter_config, scales
from convert.peft_names import CONFIG, MAGNITUDE, WEIGHTS, A, B, part_layouts, peft_name, split_key
from convert.peft_save import save_adapter
from convert.safetensors import NAMES, load_header
from convert.tensor import Tensor
from convert.typed_json import load_json
from paligemma_jax.model.config import PaliGemmaConfig

__all__ = ["Factors", "base_checkpoint", "is_adapter", "load_adapter", "read", "save_adapter"]

Parts = dict[str, np.ndarray]  # of the update of a layer


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def base_checkpoint(directory: Path) -> str:
    """The base checkpoint named in the config of an adapter. Raises ValueError if there is none."""
    name = load_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{directory / CONFIG} has no base_model_name_or_path; add it")
    return name


def load_adapter(directory: Path, config: PaliGemmaConfig) -> dict[str, Factors]:
    """The factors of an adapter by the path of the layer, as in "decoder/layers/3/attention/q".

    Raises:
        ValueError: As in `read`, or if the adapter replaces parameters too.
    """
    adapter = read(directory, config)
    if adapter.parameters:
        raise ValueError(f"{directory} has modules_to_save; use convert.peft.read")
    return adapter.factors


def read(directory: Path, config: PaliGemmaConfig) -> Adapter:
    """Read an adapter of a model with this config.

    Raises:
        ValueError: The adapter does not fit the model, or has settings that are not supported. All
            tensors that do not fit are listed.
    """
    settings, file = load_adapter_config(directory), _weight_file(directory)
    weights = {weight.key: weight for weight in huggingface_weights(config)}
    names: dict[str, str] = {}  # of the layers in the file, by path
    updates: dict[str, Parts] = {}
    parameters: dict[str, Tensor] = {}
    errors = []
    for key, entry in load_header(file).items():
        name, part = split_key(key)
        weight = weights.get(canonical_name(f"{name}.weight" if part else name))
        if weight is None or not (part or _is_saved(name, settings)):
            errors.append(f"unknown key {key}")
        elif not _fits(entry, weight, part):
            found = f"{key} is {entry.dtype} {list(entry.shape)}"
            errors.append(f"{found}, which does not fit {weight.path}")
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
    return Adapter(factors, parameters)


def _weight_file(directory: Path) -> Path:
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
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if _is_saved(name, settings):
            errors.append(f"{name} is in modules_to_save, which unties the head")
    for key, weight in weights.items():
        is_saved = _is_saved(key, settings) or _is_saved(peft_name(key), settings)
        if is_saved and weight.path not in parameters:
            errors.append(f"{peft_name(key)}, which is in modules_to_save, is missing")
    return errors if errors or updates or parameters else ["it is empty"]
