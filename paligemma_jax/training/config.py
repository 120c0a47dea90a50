"""Every choice of a fine-tuning run, as one frozen value: the flags of `paligemma-jax finetune`, and what is written into its folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args, get_origin, get_type_hints

from paligemma_jax.model.precision import Quantization

# What --train takes: the parameters whose path (`model/layers.parameters`) matches.
TRAIN = {
    "all": r".*",
    "decoder": r"decoder/.*",
    "attention": r"decoder/layers/.*attention/.*",
    "projector": r"projector/.*",
    "lora": r".*/lora_[ab]",
}


@dataclass(frozen=True)
class FinetuneConfig:
    """What a run does, each choice with its default. ValueError for what cannot be."""

    data: str
    """Rows to learn from: JSONL with image (a path, or a list of them; relative to the file), prefix, suffix and, if wanted, weight."""
    output: str
    """The run's folder: config.json, log.jsonl, loss.png, checkpoints/ and, at the end, model/ or adapter/."""
    model: str = "tiny"
    """What to start from: tiny (embedded), a directory in Hugging Face layout, a converted checkpoint, or a hub id."""
    validation: str | None = None
    """Rows to measure on, as --data."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint."""

    train: str = "all"
    """What learns: all, decoder, attention, projector, lora, or a regular expression of parameter paths like projector/.*|.*/lora_[ab]"""
    lora_rank: int = 16
    """Of LoRA in the decoder."""
    lora_vision_rank: int = 0
    """Of LoRA in the image encoder."""
    lora_alpha: float = 16.0
    """What LoRA learns counts alpha / rank times."""
    rslora: bool = False
    """It counts alpha / sqrt(rank) times instead (arXiv:2312.03732)."""
    lora_dropout: float = 0.0
    """Part of the inputs of LoRA that is dropped in training."""
    lora_target: str = r".*(attention|mlp)/\w+"
    """What LoRA adapts: a regular expression of paths like decoder/layers/attention/q (decoder/layers/3/attention/q with --layers list)."""
    quantize: str | None = None
    """Hold the decoder's projections, frozen, in int8, int4 or nf4 (with --train lora: QLoRA), or more: nf4-64-double,embedding=int8,vision=int8"""

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
    """Counts times the learning rate; not of norms and biases."""
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
    """Of the order of the rows, of augmentation, dropout and the start of LoRA."""

    flip: float = 0.0
    """Chance that a picture is mirrored, its boxes with it; never where its row speaks of left or right."""
    crop: float = 1.0
    """Smallest part of each side that a random crop keeps; boxes go along."""
    color: float = 0.0
    """Largest random change of brightness, contrast and saturation; 0.2 is usual."""

    features: str | None = None
    """Keep the outputs of the frozen image encoder in this folder, for all epochs and runs."""

    length: int | None = None
    """Pad every row to this many tokens, so that one program serves; by default to the max_targets of its batch, rounded up to 32."""
    dtype: str | None = None
    """Of activations and frozen weights: bfloat16 or float32. By default bfloat16, on a CPU float32. What learns is float32 always."""
    numerics: str | None = None
    """transformers or big_vision, where the two compute different numbers; by default the one that the checkpoint means."""
    remat: Literal["none", "full", "dots"] = "none"
    """What of each layer is computed again in the backward pass to save memory: nothing, all, or all but the products with weights."""
    mesh: str | None = None
    """Devices to spread model, optimizer and batch over: data=2,fsdp=4,tensor=2 (what is left out is 1), or auto for all there are."""
    hosts: str | None = None
    """Train in several processes as one: auto (a TPU pod, Slurm, Open MPI tell), or HOST:PORT,N,I for process I of N; or set PALIGEMMA_JAX_HOSTS."""
    layers: Literal["stack", "list"] = "stack"
    """stack compiles one layer and loops; a list compiles each, and lets --train name single layers."""

    validate_every: int = 0
    """Steps between measurements on --validation; 0 for only at the end."""
    samples: int = 4
    """Rows of --validation to answer at each measurement, into samples.jsonl."""
    tensorboard: bool = False
    """Write the log for TensorBoard too."""
    save_every: int = 100
    """Steps between checkpoints; one is made at each measurement on --validation too, and at the end."""
    keep: int = 2
    """Last checkpoints to keep; the best on --validation stays as well."""
    export: Literal["jax", "huggingface", "big_vision"] | None = None
    """Format of the final model/: jax (this project's own, the default), huggingface or big_vision. LoRA leaves adapter/, and model/ if asked."""

    def __post_init__(self):
        rules: list[tuple[str, Callable[[float], bool], str]] = [
            ("is at least 1", lambda x: x >= 1, "steps length batch_size accumulate save_every keep"),
            ("is not negative", lambda x: x >= 0, "warmup weight_decay clip validate_every samples vision_rate lora_rank lora_vision_rank"),
            ("is a number above 0", lambda x: 0 < x < inf, "learning_rate lora_alpha epochs"),
            ("lies in 0 <= x < 2**32", lambda x: 0 <= x < 2**32, "seed"),
            ("lies in 0 <= x < 1", lambda x: 0 <= x < 1, "beta1 beta2 label_smoothing ema lora_dropout color"),
            ("lies in 0 <= x <= 1", lambda x: 0 <= x <= 1, "flip"),
            ("lies in 0 < x <= 1", lambda x: 0 < x <= 1, "crop"),
        ]
        for rule, holds, names in rules:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} {value}: it {rule}")
        for name, hint in get_type_hints(FinetuneConfig).items():
            known = [word for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for word in get_args(kind)]
            if known and (value := getattr(self, name)) not in (*known, getattr(FinetuneConfig, name)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: there are {', '.join(known)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")
        for name, known in (("train", f"{', '.join(TRAIN)} or "), ("lora_target", "")):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r} is not {known}a regular expression: {error}") from None
        Quantization.parse(self.quantize)
        if self.features and self.augments:
            raise ValueError("--features are those of the pictures as they are: leave out --flip, --crop and --color")

    @property
    def pattern(self) -> str:
        """The regular expression of the paths of what learns."""
        return TRAIN.get(self.train, self.train)

    @property
    def lora(self) -> bool:
        return "lora" in self.train

    @property
    def augments(self) -> bool:
        return self.flip > 0 or self.crop < 1 or self.color > 0
