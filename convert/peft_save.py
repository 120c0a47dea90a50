"""Save an adapter that peft loads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from convert.adapter import Factors
from convert.files import atomic_output, json_bytes
from convert.layout import reorder
from convert.match import huggingface_weights
from convert.peft_config import PREFIX_TUNING, PROMPT_TUNING
from convert.peft_names import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    SOFT_PROMPT,
    WEIGHTS,
    A,
    B,
    part_key,
    part_layouts,
    peft_name,
)
from convert.safetensors import make_header
from convert.table import HEAD, TABLE_PATH
from paligemma_jax.model.config import PaliGemmaConfig


def save_adapter(
    directory: Path,
    adapter: Mapping[str, Factors],
    config: PaliGemmaConfig,
    base: str,
    parameters: Mapping[str, np.ndarray] = MappingProxyType({}),
    soft_prompt: np.ndarray | None = None,
    prefix: np.ndarray | None = None,
) -> None:
    """Save an adapter that peft loads onto transformers' model of `config`. The directory appears
    when it is complete.

    Args:
        directory: Replaced if it exists.
        adapter: Factors by the path of the layer. All have a magnitude, or none has.
        config: Config of the model.
        base: The name of the base checkpoint.
        parameters: New values of other parameters by path: all those of some modules.
        soft_prompt: float32[N, D]. Alone it is an adapter of peft's prompt tuning. Beside LoRA,
            peft loads the LoRA only.
        prefix: float32[N, L, 2, K, H], keys and values. Always alone: peft's prefix tuning.
    """
    shared: dict[str, object] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if prefix is not None:
        if adapter or parameters or soft_prompt is not None:
            raise ValueError("a prefix must be saved alone, got other parts of an adapter")
        settings = shared | _prefix_settings(config, len(prefix))
        return _write(directory, {SOFT_PROMPT: prefix.reshape(len(prefix), -1)}, settings)
    if parameters and not adapter:
        raise ValueError(f"{min(parameters)} can be saved beside LoRA only")
    if soft_prompt is not None and not adapter:
        settings = shared | _prompt_settings(config, len(soft_prompt))
        return _write(directory, {SOFT_PROMPT: soft_prompt}, settings)
    weights = {weight.path: weight for weight in huggingface_weights(config)}
    tensors, ranks, alphas = {}, {}, {}
    for path, factors in adapter.items():
        weight = weights[f"{path}/kernel"]
        layer = peft_name(weight.key).removesuffix(".weight")
        ranks[layer], alphas[layer] = factors.rank, factors.scale * factors.rank
        parts = {A: factors.a, B: factors.b, MAGNITUDE: factors.magnitude}
        sizes = weight.sizes | {"R": factors.rank}
        for part, (file_layout, model_layout) in part_layouts(weight).items():
            array = parts[part]
            if array is not None:
                array = reorder(np.asarray(array), model_layout, file_layout, sizes)
                tensors[part_key(layer, part)] = array
    saved = set()
    for path, array in parameters.items():
        weight = weights[path]
        names = [peft_name(weight.key)]
        if path == TABLE_PATH and config.decoder.tie_word_embeddings:  # peft replaces them apart
            names.append(peft_name(HEAD))
        layouts = weight.model_layout, weight.file_layout
        for name in names:
            tensors[PREFIX + name] = reorder(np.asarray(array), *layouts, weight.sizes)
            saved.add(name.rpartition(".")[0])
    if soft_prompt is not None:
        tensors[SOFT_PROMPT] = soft_prompt
    (rank, rank_pattern), (alpha, alpha_pattern) = _pattern(ranks), _pattern(alphas)
    settings = shared | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(factors.magnitude is not None for factors in adapter.values()),
        "modules_to_save": sorted(saved) or None,
        "target_modules": sorted(ranks),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    _write(directory, tensors, settings)


def _prompt_settings(config: PaliGemmaConfig, count: int) -> dict[str, object]:
    decoder = config.decoder
    return {
        "peft_type": PROMPT_TUNING,
        "num_virtual_tokens": count,
        "token_dim": decoder.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": decoder.num_attention_heads,
        "num_layers": decoder.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }


def _prefix_settings(config: PaliGemmaConfig, count: int) -> dict[str, object]:
    layers, _, K, H = config.decoder.prefix_shape
    return {
        "peft_type": PREFIX_TUNING,
        "num_virtual_tokens": count,
        "token_dim": K * H,
        "num_transformer_submodules": 1,
        "num_attention_heads": K,
        "num_layers": layers,
        "encoder_hidden_size": K * H,
        "prefix_projection": False,
    }


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most common value, and the others by a regular expression for their layer."""
    [(common, _)] = Counter(values.values()).most_common(1)
    others = {f"^{re.escape(name)}$": v for name, v in values.items() if v != common}
    return common, others


def _write(directory: Path, tensors: Mapping[str, np.ndarray], settings: dict[str, object]) -> None:
    contiguous = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    header, _ = make_header({key: (array.dtype, array.shape) for key, array in contiguous.items()})
    with atomic_output(directory, force=True) as new:
        new.mkdir()
        (new / WEIGHTS).write_bytes(header + b"".join(a.tobytes() for a in contiguous.values()))
        (new / CONFIG).write_bytes(json_bytes(settings))
