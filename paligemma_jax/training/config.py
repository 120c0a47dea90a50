"""Every choice of a fine-tuning run, as one frozen value: the flags of `paligemma-jax finetune`, and what is written into its folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# What --train takes: the parameters whose path (`model/layers.parameters`) matches.
TRAIN = {
    "all": r".*",
    "decoder": r"decoder/.*",
    "attention": r"decoder/layers/.*attention/.*",
    "projector": r"projector/.*",
}


@dataclass(frozen=True)
class Finetune:
    data: str
    """Rows to learn from: JSONL with image (a path, or a list of them; relative to the file), prefix, suffix and, if wanted, weight."""
    output: str
    """The run's folder: config.json, log.jsonl, loss.png, checkpoints/ and, at the end, model/."""
    model: str = "tiny"
    """What to start from: tiny (embedded), a directory in Hugging Face layout, a converted checkpoint, or a hub id."""
    validation: str | None = None
    """Rows to measure on, as --data."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint."""

    train: str = "all"
    """What learns: all, decoder, attention, projector, or a regular expression of parameter paths like vision/.*|projector/.*"""

    steps: int | None = None
    """Optimizer steps; by default --epochs decides."""
    epochs: float = 1.0
    """Times through the data, where --steps is not given."""
    batch_size: int = 8
    """Rows a step."""
    accumulate: int = 1
    """Parts that each batch is computed in, one after the other; the gradient is that of the whole batch."""
    learning_rate: float = 2e-5
    """The highest."""
    vision_rate: float = 1.0
    """The image encoder learns at this part of it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up, down to zero or not."""
    warmup: float = 0.05
    """Steps of the warm-up, or below 1 its part of all steps."""
    optimizer: Literal["adamw", "adafactor", "sgd", "muon"] = "adamw"
    """sgd has momentum --beta1. muon (arXiv:2502.16982) is for the matrices of the layers, AdamW for the rest."""
    weight_decay: float = 0.0
    """Not of norms and biases."""
    beta1: float = 0.9
    """Of AdamW, Muon and SGD."""
    beta2: float = 0.999
    """Of AdamW."""
    clip: float = 1.0
    """The largest norm of the gradient; 0 for any."""
    label_smoothing: float = 0.0
    """The part of each target that is spread over the whole vocabulary."""
    reduction: Literal["tokens", "examples"] = "tokens"
    """The loss is the mean over tokens (as transformers), or over rows of each row's mean (as big_vision)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is measured and saved; 0 for none."""
    seed: int = 0
    """Of the order of the rows."""

    length: int | None = None
    """Pad every row to this many tokens, so that one program serves; by default to the longest of its batch, rounded up to 32."""
    dtype: str | None = None
    """Of activations and frozen weights: bfloat16 or float32. By default bfloat16, on a CPU float32. What learns is float32 always."""
    numerics: str | None = None
    """transformers or big_vision, where the two compute different numbers; by default the one that the checkpoint means."""
    remat: Literal["none", "full", "dots"] = "none"
    """What of each layer is computed again in the backward pass to save memory: nothing, all, or all but the products with weights."""
    layers: Literal["stack", "list"] = "stack"
    """stack compiles one layer and loops; a list compiles each, and lets --train name single layers."""

    validate_every: int = 0
    """Steps between measurements on --validation; 0 for only at the end."""
    save_every: int = 100
    """Steps between checkpoints; one is always made at the end."""
    keep: int = 2
    """Last checkpoints to keep; the best on --validation stays as well."""
    export: Literal["jax", "huggingface", "big_vision"] = "jax"
    """Format of the final model/: this project's own, as transformers reads it, or as big_vision does."""

    def __post_init__(self):
        at_least_1 = {name: getattr(self, name) for name in ("batch_size", "accumulate", "save_every", "keep") if getattr(self, name) < 1}
        at_least_0 = {
            name: getattr(self, name)
            for name in ("warmup", "weight_decay", "clip", "validate_every", "seed", "vision_rate")
            if getattr(self, name) < 0
        }
        below_1 = {name: getattr(self, name) for name in ("beta1", "beta2", "label_smoothing", "ema") if not 0 <= getattr(self, name) < 1}
        for wrong, rule in ((at_least_1, "is at least 1"), (at_least_0, "is not negative"), (below_1, "lies in 0 <= x < 1")):
            for name, value in wrong.items():
                raise ValueError(f"--{name.replace('_', '-')} {value}: it {rule}")
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise ValueError(f"nothing to do: steps {self.steps}, epochs {self.epochs}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning-rate {self.learning_rate}: it is above 0")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"--train {self.train!r} is neither one of {', '.join(TRAIN)} nor a regular expression: {error}") from None

    @property
    def pattern(self) -> str:
        """The regular expression of the paths of what learns."""
        return TRAIN.get(self.train, self.train)
