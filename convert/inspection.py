"""Describe a checkpoint without reading its tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from convert import peft
from convert.checkpoint import Checkpoint
from convert.files import companion_files, parse_json, user_path
from convert.formats import read
from convert.huggingface import INDEX
from convert.peft_config import load_adapter_config
from convert.quantized import dequantize_checkpoint
from convert.safetensors import load_header
from convert.typed_json import describe, load_json
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig, with_resolution


def inspect(source: str | Path | Checkpoint, config: str | Path | None = None) -> dict[str, object]:
    """Return the format, variant, size, dtypes, resolution, numerics and files of a checkpoint, and
    notes about anything unusual. Of an adapter, return its base, ranks and layers. Arguments as in
    `convert.read`."""
    if not isinstance(source, Checkpoint) and peft.is_adapter(user_path(source)):
        return _inspect_adapter(user_path(source))
    checkpoint = read(source, config)
    dense = dequantize_checkpoint(checkpoint).tensors.values()
    description: dict[str, object] = {
        "format": checkpoint.format,
        "variant": variant_name(checkpoint.config) or "unknown",
        "decoder": checkpoint.config.decoder.model_type,
        "resolution": checkpoint.config.vision.image_size,
        "numerics": checkpoint.config.numerics,
        "parameters": sum(tensor.size for tensor in dense),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(tensor.dtype.name for tensor in checkpoint.tensors.values())),
    }
    if checkpoint.formats:
        description["quantized"] = dict(Counter(map(str, checkpoint.formats.values())))
    return description | {"files": sorted(checkpoint.files), "notes": _notes(checkpoint)}


def _inspect_adapter(directory: Path) -> dict[str, object]:
    """Describe an adapter of peft. Its base is not needed."""
    notes, base = [], load_json(directory / peft.CONFIG).get("base_model_name_or_path")
    try:
        load_adapter_config(directory)
    except ValueError as error:
        notes.append(f"it cannot be loaded: {error}")
    file = peft.weight_file(directory)
    entries = load_header(file)
    names = {key: peft.split_key(key) for key in entries}
    parts = {part for _, part in names.values()}
    ranks = [entries[key].shape[:1] for key, (_, part) in names.items() if part == peft.A]
    layers = dict.fromkeys(name for name, part in names.values() if part)
    return {
        "format": "peft adapter, " + ("DoRA" if peft.MAGNITUDE in parts else "LoRA"),
        "base": base if isinstance(base, str) else describe(base),
        "rank": dict(Counter(", ".join(map(str, rank)) for rank in ranks)),
        "layers": _collapse(layers),
        "replaces": _collapse(name for name, part in names.values() if part is None),
        "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "bytes": file.stat().st_size,
        "dtypes": dict(Counter(entry.dtype for entry in entries.values())),
        "files": sorted(companion_files(directory)),
        "notes": notes,
    }


def _collapse(names: Iterable[str]) -> list[str]:
    """The distinct names, with * in place of layer numbers."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _notes(checkpoint: Checkpoint) -> list[str]:
    notes, parts = list(checkpoint.notes), checkpoint.parts
    if len({t.dtype for path, t in checkpoint.tensors.items() if path not in parts}) > 1:
        notes.append("its tensors have several dtypes")
    if variant_name(checkpoint.config) is None:
        notes.append("its shapes match no published PaliGemma")
    if INDEX in checkpoint.files:
        metadata = parse_json(checkpoint.files[INDEX]).get("metadata") or {}
        total = metadata.get("total_size", checkpoint.nbytes)
        if total != checkpoint.nbytes:
            notes.append(
                f"its index states {total} bytes, but its tensors have {checkpoint.nbytes}"
            )
    if not checkpoint.config.decoder.tie_word_embeddings:
        notes.append("its output head is not the embedding table")
    if not {"tokenizer.json", "tokenizer.model"} & checkpoint.files.keys():
        notes.append("it has no tokenizer.json or tokenizer.model, one of which is needed for text")
    return notes


def variant_name(config: PaliGemmaConfig) -> str | None:
    """The name of the preset with these sizes, at any resolution, with any numerics and head."""
    same = {"dtype": "float32", "numerics": "transformers", "eos_token_ids": (1,)}
    decoder = replace(config.decoder, tie_word_embeddings=True)
    plain = with_resolution(replace(config, decoder=decoder, **same), 224)
    for name, preset in PRESETS.items():
        if with_resolution(preset, 224) == plain:
            family = name.rpartition("-")[0]
            return f"{family}-{config.vision.image_size}" if family else name
    return None
