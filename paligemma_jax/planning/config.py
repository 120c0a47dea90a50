"""What `paligemma-jax plan` is asked, as one frozen value. Nothing here imports jax, which has to be told of the devices first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from paligemma_jax.planning import chips

Batch = Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 8, or the next number that divides over the mesh)")]


@dataclass(frozen=True)
class PlanConfig:
    model: str = "3b-224"
    """A preset (3b-224, 10b-448, 28b-896, pg1-3b-224, tiny, ...) or a checkpoint, of which config and formats are read."""
    workload: Literal["generate", "finetune"] = "generate"
    """Answer, or a training step."""
    on: str = "v5e:2x4"
    """Chips: a TPU slice by its shape (v5e:2x4, v5e:4x4, v6e:2x4, v5p:2x2x2), for which the TPU's own compiler is asked (pip install
    'paligemma-jax[plan]' into an environment of its own), or GPUs by their number (h200x8, a100-80gx3), an estimate by the compiler for CPUs."""
    mesh: str = "auto"
    """How the work is spread over them: data=2,fsdp=4,tensor=2 (what is left out is 1), or auto."""
    batch: Batch = None
    """Rows at a time, over all chips."""
    text: int = 64
    """Tokens of text a row, beside those of its image; to train, the answer included."""
    new: int = 32
    """Tokens to generate; to train, of the longest answer."""
    lora: int = 0
    """To train: the rank of LoRA; 0 trains all weights."""
    quantize: str | None = None
    """What to hold in 8 or 4 bits: int8, int4, nf4, or more in words, as for generate."""
    remat: Literal["none", "full", "dots"] = "full"
    """To train: what of each layer is computed again in the backward pass."""
    accumulate: int = 1
    """To train: parts that each batch is computed in, one after the other."""
    optimizer: Literal["adamw", "adafactor", "sgd", "muon"] = "adamw"
    """To train."""
    layers: Literal["stack", "list"] | None = None
    """How the layers are held; by default as finetune (a stack) and generate (a list) do."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of activations and of the weights that do not learn."""
    estimate: bool = False
    """By the compiler for CPUs, though that for TPUs may be there."""

    def __post_init__(self):
        if min(1 if self.batch is None else self.batch, self.text, self.new - 1) < 1 or self.lora < 0:
            raise ValueError("plan counts from 1: --batch and --text are at least 1, --new at least 2, --lora at least 0")
        if self.workload == "generate" and self.lora:
            raise ValueError("--lora is for --workload finetune: an adapter is merged before it answers")
        if self.quantize and self.workload == "finetune" and not self.lora:
            raise ValueError("--quantize freezes the decoder's projections: give --lora RANK to adapt them")
        chips.find_slice(self.on)

    @property
    def training(self) -> bool:
        return self.workload == "finetune"

    @property
    def rows(self) -> int:
        return self.batch or 8

    @property
    def parts(self) -> int:
        """In which a batch is computed."""
        return self.accumulate if self.training else 1
