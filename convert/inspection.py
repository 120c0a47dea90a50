"""Describe a checkpoint without reading its tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.files import parse_json
from convert.formats import read
from convert.huggingface import INDEX
from convert.quantized import dequantize_checkpoint
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig, with_resolution


def inspect(source: str | Path, config: str | Path | None = None) -> dict[str, object]:
    """Return the format, variant, size, dtypes, resolution, numerics and files of a checkpoint, and
    notes about anything unusual. Arguments as in `convert.read`."""
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
