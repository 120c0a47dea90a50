"""LoRA adapters of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.files import atomic_output, json_bytes
from convert.huggingface import canonical_name
from convert.layout import layout_shape, reorder
from convert.match import Weight, huggingface_weights
from convert.safetensors import NAMES, load_header, make_header
from convert.typed_json import JsonObject, load_json
from paligemma_jax.model.config import PaliGemmaConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Released names -> the module tree of transformers 5, which peft uses.
MODULE_SPELLINGS = [
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
]

# Settings of peft beyond the LoRA of the paper; they must be absent or empty.
UNSUPPORTED = re.compile(
    "modules_to_save|use_dora|lora_bias|fan_in_fan_out|layer_replication|trainable_token_indices|"
    "target_parameters|alora_invocation_tokens|use_qalora|use_bdlora"
)


@dataclass(frozen=True)
class Factors:
    """The LoRA update of one kernel: scale * b @ a."""

    a: np.ndarray  # float32[R, in...]
    b: np.ndarray  # float32[out..., R]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def base_checkpoint(directory: Path) -> str:
    """The base checkpoint named in the config of an adapter. Raises ValueError if there is none."""
    name = load_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{directory / CONFIG} has no base_model_name_or_path; add it")
    return name


def load_adapter(directory: Path, config: PaliGemmaConfig) -> dict[str, Factors]:
    """The factors of an adapter by the path of the module, as in "decoder/layers/3/attention/q".

    Raises:
        ValueError: If the adapter does not fit the model, or is not LoRA of linear layers. All
            tensors that do not fit are listed.
    """
    settings, file = load_json(directory / CONFIG), directory / WEIGHTS
    allowed = {"peft_type": "LORA", "bias": "none"}
    used = [
        f"{name} {value!r}"
        for name, value in settings.items()
        if value and (UNSUPPORTED.fullmatch(name) or value != allowed.get(name, value))
    ]
    if used:
        raise ValueError(f"{directory} is not a plain LoRA adapter: {', '.join(used)}")
    if not file.is_file():
        is_pickle = (directory / "adapter_model.bin").exists()
        hint = "; save it with safe_serialization=True (pickled weights are never opened)"
        raise ValueError(f"{directory} has no {WEIGHTS}{hint if is_pickle else ''}")
    sides, errors = _load_sides(file, config)
    adapter = {}
    for weight in _linear_weights(config).values():
        path = weight.path.removesuffix("/kernel")
        a, b = sides.get((path, "A")), sides.get((path, "B"))
        if a is not None and b is not None and len(a) == b.shape[-1]:
            adapter[path] = Factors(a, b, _scale(settings, _module(weight), len(a)))
        elif a is not None or b is not None:
            errors.append(f"{path} needs lora_A and lora_B of the same rank")
    if not adapter and not errors:
        errors.append("it is empty")
    if errors:
        count = f" (errors: {len(errors)})" if len(errors) > 5 else ""
        raise ValueError(f"{file} does not fit the model: {'; '.join(errors[:5])}{count}")
    return adapter


def save_adapter(
    directory: Path, adapter: Mapping[str, Factors], config: PaliGemmaConfig, base: str
) -> None:
    """Save an adapter that peft loads onto transformers' model of `config`. The directory appears
    when it is complete.

    Args:
        directory: Replaced if it exists.
        adapter: Factors by the path of the module.
        config: Config of the model.
        base: The name of the base checkpoint.
    """
    weights = {weight.path: weight for weight in _linear_weights(config).values()}
    tensors, ranks, alphas = {}, {}, {}
    for path, factors in adapter.items():
        weight = weights[f"{path}/kernel"]
        module = _module(weight)
        for pattern, replacement in MODULE_SPELLINGS:
            module = re.sub(pattern, replacement, module)
        ranks[module], alphas[module] = factors.rank, factors.scale * factors.rank
        sizes = weight.sizes | {"R": factors.rank}
        for side, array in (("A", factors.a), ("B", factors.b)):
            file_layout, model_layout = _layouts(weight)[side]
            array = reorder(np.asarray(array), model_layout, file_layout, sizes)
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = np.ascontiguousarray(array)
    (rank, rank_pattern), (alpha, alpha_pattern) = _pattern(ranks), _pattern(alphas)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    header, _ = make_header({key: (array.dtype, array.shape) for key, array in tensors.items()})
    data = b"".join(array.tobytes() for array in tensors.values())
    with atomic_output(directory, force=True) as new:
        new.mkdir()
        (new / WEIGHTS).write_bytes(header + data)
        (new / CONFIG).write_bytes(json_bytes(settings))


def _linear_weights(config: PaliGemmaConfig) -> dict[str, Weight]:
    """Return the kernels of linear layers by module name, without the embeddings and the patch
    embedding (a convolution in torch)."""
    return {
        _module(weight): weight
        for weight in huggingface_weights(config)
        if weight.path.endswith("/kernel") and weight.path != "vision/patch/kernel"
    }


def _load_sides(
    file: Path, config: PaliGemmaConfig
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """Return the factors in the model's layout by path and side ("A" or "B"), and the errors."""
    weights, sides, errors = _linear_weights(config), {}, []
    for key, entry in load_header(file).items():
        name = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)(\.default)?\.weight", key)
        weight = weights.get(_released_module(name[1])) if name else None
        if name is None or weight is None:
            errors.append(f"unknown key {key}")
            continue
        path, side = weight.path.removesuffix("/kernel"), name[2]
        rank = entry.shape[0 if side == "A" else -1] if len(entry.shape) == 2 else 0
        file_layout, model_layout = _layouts(weight)[side]
        sizes = weight.sizes | {"R": rank}
        fits = rank and entry.shape == layout_shape(file_layout, sizes)
        if fits and entry.dtype in NAMES:
            array = entry.open().load().astype(np.float32)
            sides[path, side] = reorder(array, file_layout, model_layout, sizes)
        else:
            errors.append(f"{key} is {entry.dtype} {list(entry.shape)}, which does not fit {path}")
    return sides, errors


def _module(weight: Weight) -> str:
    return weight.key.removesuffix(".weight")


def _released_module(name: str) -> str:
    return canonical_name(name + ".weight").removesuffix(".weight")


def _layouts(weight: Weight) -> dict[str, tuple[str, str]]:
    """The layouts of lora_A and lora_B in the file and here: for a kernel that is "NH D" in the
    file, A is "R D" in both, and B is "NH R" and "N H R"."""
    out, ins = weight.file_layout.split()
    return {"A": (f"R {ins}", " ".join(["R", *ins])), "B": (f"{out} R", " ".join([*out, "R"]))}


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most common value, and the others by a regular expression for their module."""
    [(common, _)] = Counter(values.values()).most_common(1)
    others = {f"^{re.escape(name)}$": v for name, v in values.items() if v != common}
    return common, others


def _scale(settings: JsonObject, module: str, rank: int) -> float:
    """The scale that peft would use: its patterns are suffixes of module names, or regular
    expressions for them."""

    def setting(name: str, default: float) -> float:
        for pattern, value in (settings.get(f"{name}_pattern") or {}).items():
            released = _released_module(pattern.strip("^$").replace("\\", ""))
            if any(re.fullmatch(rf"(.*\.)?({p})", module) for p in (released, pattern)):
                return value
        return default

    try:
        declared = int(setting("rank", settings["r"]))
        alpha = float(setting("alpha", settings["lora_alpha"]))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"the adapter has an invalid r or lora_alpha: {error!r}") from None
    if declared != rank:
        raise ValueError(f"{module} has rank {rank}, but its config has {declared}")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
