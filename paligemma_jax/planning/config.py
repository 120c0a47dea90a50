"""The flags of `paligemma-jax plan`. Must not import jax: the number of devices is set first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from paligemma_jax.model.config import AttentionForm
from paligemma_jax.planning.chips import Slice

BatchSize = Annotated[
    int | None, tyro.conf.arg(help_behavior_hint="(default: 8, rounded up to fit the mesh)")
]
Layers = Annotated[
    Literal["stack", "list"] | None,
    tyro.conf.arg(help_behavior_hint="(default: list for generate, stack for finetune)"),
]

Attention = Annotated[
    AttentionForm | None,
    tyro.conf.arg(help_behavior_hint="(default: fused; plain for an estimate)"),
]


@dataclass(frozen=True)
class PlanConfig:
    """What to plan: a model, a workload and chips to run it on."""

    model: str = "3b-224"
    """A preset (3b-224, 10b-448, 28b-896, pg1-3b-224, tiny, ...), or a checkpoint. For a
    checkpoint, only the config and the formats of quantized weights are read."""
    workload: Literal["generate", "finetune"] = "generate"
    """Plan inference or a training step."""
    on: str = "v5e:2x4"
    """The chips: a TPU slice by its shape (v5e:2x4, v5e:4x4, v6e:2x4, v5p:2x2x2) or GPUs by their
    count (h200x8, a100-80gx3). Programs for TPUs are compiled by the TPU compiler (pip install
    'paligemma-jax[plan]' in a separate environment); those for GPUs are estimated with the CPU
    compiler."""
    mesh: str = "auto"
    """Mesh of the chips: data=2,fsdp=4,tensor=2 (axes left out have size 1), or auto."""
    batch: BatchSize = None
    """Global batch size."""
    text: int = 64
    """Text tokens per example, besides the image tokens; for finetune, prompt and answer."""
    new: int = 32
    """Tokens to generate; for finetune, tokens of the longest answer."""
    lora: int = 0
    """LoRA rank for finetune; 0 trains all weights."""
    quantize: str | None = None
    """Quantize weights or cache: int8, w8a8, int4, nf4, or a list such as
    nf4-32,embedding=int8."""
    remat: Literal["none", "full", "outputs", "dots"] = "full"
    """What the backward pass recomputes to save memory: nothing, each layer (full), or each
    layer except the outputs of attention and MLP, or its matrix products (dots)."""
    accumulate: int = 1
    """Number of parts that each batch is split into, to save memory (gradient accumulation)."""
    optimizer: Literal["adamw", "adafactor", "sgd", "muon"] = "adamw"
    """Optimizer for finetune."""
    layers: Layers = None
    """Compile every layer (list), or one layer that a loop runs (stack)."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of activations and frozen weights."""
    attention: Attention = None
    """Form of attention: fused keeps scores on the chip."""
    estimate: bool = False
    """Estimate with the CPU compiler even if the TPU compiler is installed."""
    profile: bool = False
    """List the costliest operations of each program, with the lines of the model they come from.
    TPUs only."""

    def __post_init__(self):
        Slice.parse(self.on)
        for name, minimum in {"batch": 1, "text": 1, "new": 2, "lora": 0}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, got {value}")
        if self.workload == "generate" and self.lora:
            raise ValueError(
                "--lora is for --workload finetune: adapters are merged before inference"
            )
        if self.quantize and self.workload == "finetune" and not self.lora:
            raise ValueError(
                "--quantize freezes the decoder's projections; give --lora RANK to train adapters"
            )
        if self.attention == "fused" and self.estimated:
            raise ValueError(
                "--attention must be plain for estimates with the CPU compiler, got fused"
            )
        if self.profile and self.estimated:
            raise ValueError(
                "--profile reads the programs of the TPU compiler: give --on a TPU slice, such as "
                "v5e:2x4, without --estimate"
            )

    @property
    def estimated(self) -> bool:
        """Whether the CPU compiler stands in for the chips' own."""
        return self.estimate or not Slice.parse(self.on).chip.axes

    @property
    def training(self) -> bool:
        return self.workload == "finetune"

    @property
    def rows(self) -> int:
        """The batch size, or its default."""
        return self.batch or 8

    @property
    def parts(self) -> int:
        """Number of parts that a batch is computed in."""
        return self.accumulate if self.training else 1
