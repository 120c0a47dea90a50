"""Run transformers on a parity case."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from paligemma_jax.parity import torch_loading, torch_model, torch_stages
from paligemma_jax.parity.case import ParityCase

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration as TorchModel

WEIGHTS_FACTOR = 1.5  # memory of a model over its weights: activations, two copies of a tensor
MAX_ATTENTION = 2**29  # maximum bytes of attention weights to compare

Stages = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """transformers' stages, greedy tokens (with gaps) and gradients.

    `stages` are in the dtype of the comparison. `exact` are in float32 from the inputs on, and
    `exact_local` in float32, each stage computed from `stages`. In a float32 comparison all three
    are the same.
    """

    stages: Stages
    exact: Stages
    exact_local: Stages
    attention: bool  # whether attention weights are among the stages
    greedy: tuple[np.ndarray, np.ndarray] | None = None
    gradients: Stages | None = None

    @property
    def fed(self) -> Stages:
        """The stages that a model can continue from: all but attention weights."""
        return {k: value for k, value in self.stages.items() if not k.endswith("/weights")}


def compute_reference(
    case: ParityCase,
    new: int = 0,
    gradients: bool = False,
    bfloat16: bool = False,
    weights: str = "float32",
) -> Reference:
    """Run transformers.

    Args:
        case: Weights and inputs.
        new: Greedy tokens to generate; 0 for none.
        gradients: Compute gradients too (in float32 only).
        bfloat16: Run in bfloat16, and in float32 on the same weights.
        weights: "float32" or "bfloat16", to which the weights are rounded.

    Raises:
        ValueError: transformers cannot load or run the model.
    """
    profile = case.checkpoint.config.profile
    needed = WEIGHTS_FACTOR * weight_bytes(case, "float32")
    keep = needed < available_memory()
    if not keep and case.source and (case.source.adapter or case.source.checkpoint.formats):
        raise ValueError(
            f"{case.source.reference} needs {needed / 2**30:.0f} GiB of memory for transformers to "
            f"merge or dequantize it, but only {available_memory() / 2**30:.0f} GiB are available"
        )
    attention = _attention_bytes(case) <= MAX_ATTENTION
    # Threads cost a small model more in waiting than they save.
    torch_loading.prepare_torch(1 if case.checkpoint.nbytes < 2**27 else None)

    def build(dtype: str) -> TorchModel:
        return torch_model.build_model(case, weights, dtype, keep)

    def compute(model: TorchModel, fed: Stages | None = None) -> Stages:
        return torch_stages.compute_stages(model, case.inputs, profile, attention, fed)

    model = build("bfloat16" if bfloat16 else "float32")
    stages = compute(model)
    reference = Reference(stages, stages, stages, attention)
    if new:
        greedy = torch_model.generate_greedily(model, case.prompts, profile, new)
        reference = replace(reference, greedy=greedy)
    if not bfloat16:
        return replace(
            reference, gradients=torch_model.compute_gradients(model, case) if gradients else None
        )
    del model
    model = build("float32")
    return replace(reference, exact=compute(model), exact_local=compute(model, reference.fed))


def weight_bytes(case: ParityCase, dtype: str) -> int:
    """The size of all parameters in `dtype`."""
    tensors = case.checkpoint.tensors.values()
    return jnp.dtype(dtype).itemsize * sum(math.prod(tensor.shape) for tensor in tensors)


def available_memory() -> int:
    """Bytes available without swapping; half of all memory where the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if available:
            return int(available[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _attention_bytes(case: ParityCase) -> int:
    config, inputs = case.checkpoint.config, case.inputs
    rows, tokens = inputs.tokens.shape
    sizes = (
        (config.vision, case.image_count, config.vision.num_patches),
        (config.decoder, rows, tokens),
    )
    return sum(
        4 * batch * tower.num_hidden_layers * tower.num_attention_heads * length**2
        for tower, batch, length in sizes
    )
