"""Names and layouts of the tensors in an adapter of peft."""

from __future__ import annotations

import re

from convert.match import Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SOFT_PROMPT = "prompt_embeddings"  # float[N, D], or [N, L * 2 * K * H] for a prefix

# Released names -> the module tree of transformers 5, which peft uses.
MODULE_SPELLINGS = [
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^language_model\.lm_head\.", "lm_head."),
]

# The parts of an update; the magnitude is that of DoRA.
A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


def split_key(key: str) -> tuple[str, str | None]:
    """The name of a layer and the part of its update, or the name of a parameter and None. Early
    releases of peft wrote ".default", the name of the adapter."""
    name = key.removeprefix(PREFIX)
    match = re.fullmatch(rf"(.+)\.({A}|{B}|{MAGNITUDE})(\.default)?(\.weight)?", name)
    return (match[1], match[2]) if match else (name, None)


def part_key(layer: str, part: str) -> str:
    """The key of a part of the update of a layer."""
    return f"{PREFIX}{layer}.{part}" + ("" if part == MAGNITUDE else ".weight")


def peft_name(key: str) -> str:
    """The name of a parameter in the module tree of transformers 5, from its released name."""
    for pattern, replacement in MODULE_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def part_layouts(weight: Weight) -> dict[str, tuple[str, str]]:
    """The layouts of the parts of an update in the file and here, from those of the kernel.

    For a kernel that is "NH D" in the file and "N H D" here: A is "R D" in both, B is "NH R" and
    "N H R", and the magnitude is "NH" and "N H". A convolution (W C h w) has two more axes.
    """
    out, *ins = weight.file_layout.split()
    axes = weight.model_layout.split()
    outs = " ".join(axis for axis in axes if axis in out)
    rest = " ".join(axis for axis in axes if axis not in out)
    ones = " 1" * (len(ins) - 1)
    return {
        A: (f"R {' '.join(ins)}", f"R {rest}"),
        B: (f"{out} R{ones}", f"{outs} R"),
        MAGNITUDE: (f"1 {out}{ones}" if ones else out, outs),
    }
