"""ColPali checkpoints that are LoRA adapters of peft, as vidore/colpali-v1.3 is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert import colpali, huggingface, peft
from convert.adapter import merge
from convert.colpali import KEYS, ColPaliCheckpoint
from convert.match import Weight
from convert.safetensors import load_header

KERNEL, BIAS = "projection/kernel", "projection/bias"


def has_projection(adapter: Path) -> bool:
    """Whether an adapter changes the projection of a ColPali."""
    return colpali.has_projection(load_header(peft.weight_file(adapter)))


def read(base: Path, adapter: Path) -> ColPaliCheckpoint:
    """Open an adapter merged into its base.

    Args:
        base: A ColPali of transformers or colpali-engine; or a PaliGemma, if `modules_to_save` of
            the adapter has the projection.
        adapter: The directory of the adapter.

    Raises:
        ValueError: The adapter does not fit the base, or neither has a projection.
    """
    if colpali.is_colpali(base):
        opened = colpali.read(base)
        vlm, projection = opened.vlm, {KERNEL: opened.kernel, BIAS: opened.bias}
        size = opened.bias.shape[0]
    else:
        vlm, projection = huggingface.read(base), {}
        size = _saved_size(base, adapter)
    delta = peft.read(adapter, vlm.config, _weights(size, vlm.config.decoder.hidden_size))
    projection = projection or {path: delta.parameters[path] for path in (KERNEL, BIAS)}
    merged = merge(replace(vlm, tensors=vlm.tensors | projection), delta)
    tensors = dict(merged.tensors)
    kernel, bias = tensors.pop(KERNEL), tensors.pop(BIAS)
    return ColPaliCheckpoint(replace(merged, tensors=tensors, notes=()), kernel, bias)


def _saved_size(base: Path, adapter: Path) -> int:
    """The length of a vector, from the projection that an adapter has."""
    for key, entry in load_header(peft.weight_file(adapter)).items():
        name, part = peft.split_key(key)
        if part is None and name in {f"{prefix}.bias" for prefix in KEYS} and len(entry.shape) == 1:
            return entry.shape[0]
    raise ValueError(
        f"{base} has no {KEYS[1]}, which the adapter {adapter} changes: the base must be a ColPali "
        "such as vidore/colpaligemma-3b-pt-448-base"
    )


def _weights(size: int, width: int) -> list[Weight]:
    """The parameters of the projection, under both names."""
    sizes = {"E": size, "D": width}
    layouts = {"weight": (KERNEL, "E D"), "bias": (BIAS, "E")}
    return [
        Weight(f"{name}.{end}", (), layout, path, layout, sizes)
        for name in KEYS
        for end, (path, layout) in layouts.items()
    ]
