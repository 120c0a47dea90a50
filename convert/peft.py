"""LoRA adapters of peft, in and out: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import json_bytes, output, read_json
from convert.huggingface import canonical_name
from convert.layout import layout_shape, reorder
from convert.match import Piece, pieces
from convert.safetensors import NAMES, make_header, read_header
from convert.table import HUGGINGFACE
from paligemma_jax.model.config import PaliGemmaConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# The module tree of transformers 5, under which peft spells the names of the released checkpoints.
MODULES = [
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
]

# What peft can do beyond LoRA as the paper has it, and the values that mean that it does not.
PLAIN = {
    "peft_type": ("LORA",), "bias": ("none", None), "modules_to_save": (None, []), "use_dora": (False, None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []), "use_qalora": (False, None), "use_bdlora": (False, None),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What LoRA adds to one kernel: scale * b a."""

    a: np.ndarray  # float32 [R, in...]
    b: np.ndarray  # float32 [out..., R]
    scale: float


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def base_checkpoint(directory: Path) -> str:
    """The checkpoint that an adapter is for, as its config names it. ValueError if it names none."""
    found = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise ValueError(f"{directory / CONFIG} does not say of which model it is: write its base_model_name_or_path")
    return found


def read_adapter(directory: Path, config: PaliGemmaConfig) -> dict[str, Factors]:
    """An adapter by the path of each product ("decoder/layers/3/attention/q").

    ValueError for an adapter of another model, or of another kind than LoRA on linear layers; all tensors that do not fit are told at once.
    """
    about = read_json(directory / CONFIG)
    if other := [f"{name} {about[name]!r}" for name, plain in PLAIN.items() if name in about and about[name] not in plain]:
        raise ValueError(f"{directory} is not plain LoRA: {', '.join(other)}")
    if not (directory / WEIGHTS).is_file():
        hint = ": save it with safe_serialization=True; pickled weights are never opened" if (directory / "adapter_model.bin").exists() else ""
        raise ValueError(f"{directory} has no {WEIGHTS}{hint}")
    entries = read_header(directory / WEIGHTS)
    of, found, wrong = {_module(piece): piece for piece in _linear(config)}, {}, []
    for key, entry in entries.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)(\.default)?\.weight", key)
        piece = of.get(canonical_name(match[1] + ".weight").removesuffix(".weight")) if match else None
        if match is None or piece is None:
            wrong.append(f"unknown key {key}")
            continue
        path, sides = piece.path.removesuffix("/kernel"), found.setdefault(piece.path.removesuffix("/kernel"), {})
        rank = entry.shape[0 if match[2] == "A" else -1] if len(entry.shape) == 2 else 0
        there, here = _layouts(piece)[match[2]]
        sizes = piece.sizes | {"R": rank}
        if not rank or entry.shape != layout_shape(there, sizes) or entry.dtype not in NAMES:
            wrong.append(f"{key} is {entry.dtype}{list(entry.shape)}, which does not fit {path}")
        else:
            sides[match[2]] = reorder(entry.tensor().load().astype(np.float32), there, here, sizes)
    whole = {path: sides for path, sides in found.items() if len(sides) == 2 and len(sides["A"]) == sides["B"].shape[-1]}
    wrong += [f"{path} has not both lora_A and lora_B of one rank" for path in found if path not in whole]
    if wrong or not found:
        raise ValueError(
            f"{directory / WEIGHTS} does not fit the model: {'; '.join(wrong[:5]) or 'it is empty'}{f' ({len(wrong)} faults)' * bool(wrong)}"
        )
    names = {piece.path.removesuffix("/kernel"): module for module, piece in of.items()}
    return {path: Factors(sides["A"], sides["B"], _scale(about, names[path], len(sides["A"]))) for path, sides in whole.items()}


def write_adapter(directory: Path, factors: Mapping[str, Factors], config: PaliGemmaConfig, base: str) -> None:
    """Writes an adapter that peft loads onto transformers' model of `config`; it appears when it is complete."""
    names = {piece.path.removesuffix("/kernel"): piece for piece in _linear(config)}
    tensors, modules = {}, {}
    for path, one in factors.items():
        module = names[path].key.removesuffix(".weight")
        for pattern, replacement in MODULES:
            module = re.sub(pattern, replacement, module)
        modules[module] = one
        for side, array in (("A", one.a), ("B", one.b)):
            there, here = _layouts(names[path])[side]
            sizes = names[path].sizes | {"R": len(one.a)}
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = np.ascontiguousarray(reorder(np.asarray(array), here, there, sizes))
    ranks, alphas = ({name: of(one) for name, one in modules.items()} for of in (lambda one: len(one.a), lambda one: one.scale * len(one.a)))
    rank, alpha = (max(set(values), key=values.count) for values in (list(ranks.values()), list(alphas.values())))
    about: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "modules_to_save": None,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{re.escape(name)}$": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}$": value for name, value in alphas.items() if value != alpha},
    }  # fmt: skip
    head, _ = make_header({key: (array.dtype, array.shape) for key, array in tensors.items()})
    with output(directory, force=True) as new:
        new.mkdir()
        (new / WEIGHTS).write_bytes(head + b"".join(array.tobytes() for array in tensors.values()))
        (new / CONFIG).write_bytes(json_bytes(about))


def _linear(config: PaliGemmaConfig) -> list[Piece]:
    """The matrices of linear layers: not the embeddings, and not the patches, which are a convolution in torch."""
    found = pieces(HUGGINGFACE[config.decoder.model_type], config)
    return [piece for piece in found if piece.path.endswith("/kernel") and piece.path != "vision/patch/kernel"]


def _module(piece: Piece) -> str:
    return piece.key.removesuffix(".weight")


def _layouts(piece: Piece) -> dict[str, tuple[str, str]]:
    """Of lora_A and lora_B: the layout in the file, and here; of a kernel "NH D" that is "N H D" here, A is "R D" twice, B "NH R" and "N H R"."""
    out, ins = piece.layout.split()
    return {"A": (f"R {ins}", " ".join(["R", *ins])), "B": (f"{out} R", " ".join([*out, "R"]))}


def _scale(about: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft finds it: a pattern is a suffix of the module's name, or a regular expression of one."""

    def setting(name: str, default: Any) -> Any:
        for key, value in (about.get(f"{name}_pattern") or {}).items():
            spelled = [canonical_name(key.strip("^$").replace("\\", "") + ".weight").removesuffix(".weight"), key]
            if any(re.fullmatch(rf"(.*\.)?({one})", module) for one in spelled):
                return value
        return default

    try:
        declared, alpha = int(setting("rank", about["r"])), float(setting("alpha", about["lora_alpha"]))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"the adapter's r and lora_alpha cannot be read: {error!r}") from None
    if declared != rank:
        raise ValueError(f"{module} has rank {rank}, its config says {declared}")
    return alpha / (rank**0.5 if about.get("use_rslora") else rank)
