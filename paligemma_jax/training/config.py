"""The configuration of a fine-tuning run: the flags of `paligemma-jax finetune`.

Imports no jax, so that --help is quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paligemma_jax.model.precision import Quantization
from paligemma_jax.training.ranges import check_choices, check_ranges, flag

if TYPE_CHECKING:
    from jax.sharding import Mesh

    MeshChoice = str | Mesh | None
else:
    MeshChoice = str | None  # all that a command line can give

SOFT_PROMPT = "soft_prompt"  # its path in a model
SOFT = "prompt", "prefix"  # choices of --train that train nothing but soft tokens
# Names that --train accepts, and the paths of the parameters that each trains.
TRAIN_PATTERNS = {
    "all": r".*",
    "decoder": r"decoder/.*",
    "attention": r"decoder/layers/.*attention/.*",
    "projector": r"projector/.*",
    "lora": r".*/lora_\w+",
    "prompt": SOFT_PROMPT,
    "prefix": r"decoder/layers/attention/prefix",
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Configuration of a fine-tuning run.

    Raises:
        ValueError: A value is out of range, or two of them exclude each other.
    """

    data: str
    """Training rows, JSONL: image (a path relative to the file, or a list of paths), prefix, suffix
    and, optionally, weight."""
    output: str
    """Directory of the run. Receives config.json, log.jsonl, loss.png, checkpoints/ and, at the
    end, model/ or adapter/."""
    model: str = "tiny"
    """Checkpoint to start from: tiny (embedded), a Hugging Face directory, a converted checkpoint,
    another run, or a hub id."""
    validation: str | None = None
    """Validation rows, in the format of --data."""
    resume: bool = False
    """Resume the run in --output from its last checkpoint."""
    base: str | None = None
    """Base checkpoint of --model, if that is an adapter or a checkpoint of a run and its base has
    moved."""

    train: str = "all"
    """Parameters to train: all, decoder, attention, projector, lora, prompt or prefix
    (--soft-prompt alone), or a regular expression of paths such as projector/.*|.*/lora_[ab]"""
    lora_rank: int = 16
    """LoRA rank in the decoder."""
    lora_vision_rank: int = 0
    """LoRA rank in the image encoder; 0 adds no adapters there."""
    lora_alpha: float = 16.0
    """LoRA alpha: adapter outputs are scaled by alpha / rank."""
    rslora: bool = False
    """Scale adapter outputs by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    lora_dropout: float = 0.0
    """Dropout rate of the adapters' inputs."""
    lora_target: str = (
        r".*(attention|mlp)/\w+"  # `lora.TARGET`; importing it would slow --help down
    )
    """Layers to adapt: a regular expression of paths such as decoder/layers/attention/q (or, to
    adapt only some layers, decoder/layers/[0-5]/attention/q with --layers list)."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B, and of trained norms and biases, in units of that of A (LoRA+,
    arXiv:2402.12354). As in peft, which advises at least 1; 16 is common."""
    dora: bool = False
    """Train the length of each row of the adapted matrices as well (DoRA, arXiv:2402.09353)."""
    modules_to_save: str | None = None
    """Modules to train in full beside LoRA and to save in the adapter, as with peft: a regular
    expression of paths such as projector|decoder/norm"""
    soft_prompt: int = 0
    """Number of trained vectors in front of each prompt (arXiv:2104.08691), with --train prompt or
    lora, or keys and values (arXiv:2101.00190), with --train prefix; saved in the adapter. By
    default those of --model, which are trained further."""
    quantize: str | None = None
    """Quantize the decoder's projections and freeze them: int8, w8a8, int4 or nf4 (QLoRA, with
    --train lora). Other parts by name: nf4-64-double,embedding=int8,vision=int8"""

    steps: int | None = None
    """Number of optimizer steps. By default computed from --epochs."""
    epochs: float = 1.0
    """Passes over the data, if --steps is not given."""
    batch_size: int = 8
    """Rows per optimizer step."""
    accumulate: int = 1
    """Number of parts that each batch is split into, to save memory; the gradient is the same."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    vision_rate: float = 1.0
    """Multiplier for the learning rate of the image encoder."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warmup. cosine and linear decay to 0."""
    warmup: float = 0.05
    """Linear warmup: a number of steps or, below 1, a fraction of all steps."""
    optimizer: Literal["adamw", "adafactor", "sgd", "muon"] = "adamw"
    """Optimizer. sgd uses --beta1 as momentum; muon (arXiv:2502.16982) trains the matrices of the
    layers, and AdamW trains the other parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    beta1: float = 0.9
    """First-moment decay of AdamW and Muon; momentum of SGD."""
    beta2: float = 0.999
    """Second-moment decay of AdamW."""
    clip: float = 1.0
    """Clip gradients to this global norm; 0 disables clipping."""
    label_smoothing: float = 0.0
    """Probability mass of each target that is spread over the vocabulary."""
    dropout: float = 0.0
    """Dropout rate of the outputs of attention and MLP in the decoder, as in big_vision."""
    reduction: Literal["tokens", "examples"] = "tokens"
    """Loss reduction: mean over all target tokens (as in transformers), or mean over examples of
    each example's mean (as in big_vision)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and saved; 0
    disables it."""
    seed: int = 0
    """Seed of row order, augmentation, dropout and LoRA initialization."""

    flip: float = 0.0
    """Probability of mirroring an image and the boxes in its text. Rows that mention left or right
    are never mirrored."""
    crop: float = 1.0
    """Smallest fraction of each side that a random crop keeps. Boxes are adjusted."""
    color: float = 0.0
    """Largest random change of brightness, contrast and saturation; 0.2 is common."""

    box_order: Literal["given", "random", "area", "position"] = "given"
    """Order of the boxes in an answer: as given, a new random one each time, largest first, or top
    to bottom."""
    noise_boxes: int = 0
    """Number of boxes in each answer with boxes: random ones labelled noise follow the objects, so
    that the model does not learn to stop early (pix2seq, arXiv:2109.10852); 0 adds none."""

    features: str | None = None
    """Directory that caches the outputs of the frozen image encoder across epochs and runs."""

    length: int | None = None
    """Pad every row to this many tokens, so that only one program is compiled. By default each
    batch is padded to its longest row, rounded up to a multiple of 32."""
    dtype: str | None = None
    """Dtype of activations and frozen weights: bfloat16 or float32. By default float32 on a CPU,
    else bfloat16. Trained weights are always float32."""
    numerics: str | None = None
    """Follow transformers or big_vision where their numerics differ. By default, follow the
    checkpoint."""
    remat: Literal["none", "full", "outputs", "dots"] = "none"
    """Activations to recompute in the backward pass to save memory: none, all (full), or all but
    the outputs of attention and MLP (outputs) or the results of products with weights (dots)."""
    attention: Literal["plain", "fused"] | None = None
    """Form of attention: fused keeps scores on the chip, on TPUs and GPUs; plain runs everywhere.
    By default the fastest."""
    mesh: MeshChoice = None
    """Devices to shard model, optimizer and batch over: axis sizes such as data=2,fsdp=4,tensor=2
    (axes left out have size 1), or auto for all devices. In Python also a jax.sharding.Mesh."""
    hosts: str | None = None
    """Multi-process setup: auto (TPU pod, Slurm, Open MPI), or HOST:PORT,COUNT,INDEX. By default
    $PALIGEMMA_JAX_HOSTS, else a single process."""
    layers: Literal["stack", "list"] = "stack"
    """stack compiles one layer and scans over all; list compiles each layer and lets --train select
    single layers."""

    validate_every: int = 0
    """Steps between validations; 0 validates at the end only."""
    samples: int = 4
    """Number of validation rows to answer at each validation; answers go to samples.jsonl."""
    metric: tuple[str, ...] = ()
    """Metrics of the answers to the validation rows, such as exact_match or coco, as for evaluate.
    The first decides on best/, instead of the validation loss."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers besides log.jsonl: tensorboard, wandb, trackio."""
    tensorboard: bool = False
    """The same as --log tensorboard."""
    save_every: int = 100
    """Steps between checkpoints. One is also saved at each validation and at the end."""
    keep: int = 2
    """Number of recent checkpoints to keep, besides the best one on validation."""
    export: Literal["jax", "huggingface", "big_vision"] | None = None
    """Format of the final model/. By default jax, this project's own. LoRA runs save adapter/, and
    model/ only if a format is given."""

    def __post_init__(self):
        check_ranges(self)
        check_choices(self)
        for name in ("metric", "log"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(f"{flag(name)} must be names, got {getattr(self, name)!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate must divide --batch-size {self.batch_size}, got {self.accumulate}"
            )
        names = ", ".join(TRAIN_PATTERNS)
        patterns = ("train", f"{names} or "), ("lora_target", ""), ("modules_to_save", "")
        for name, choices in patterns:
            value = getattr(self, name) or ""
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"{flag(name)} must be {choices}a regular expression, got {value!r}: {error}"
                ) from None
        for name in ("dora", "modules_to_save", "loraplus_lr_ratio"):
            if getattr(self, name) != getattr(type(self), name) and not self.lora:
                raise ValueError(f"{flag(name)} requires --train lora, got --train {self.train}")
        if self.soft_prompt and not (self.lora or self.train in SOFT):
            known = "--train prompt, prefix or lora"
            raise ValueError(f"--soft-prompt requires {known}, got --train {self.train}")
        if self.export and (self.soft_prompt or self.train in SOFT):
            raise ValueError(
                f"--export {self.export} must be left out with soft tokens, which no model has"
            )
        Quantization.parse(self.quantize)
        if self.features and self.augments:
            raise ValueError(
                "--features caches the features of unchanged images, so it cannot be combined with "
                "--flip, --crop or --color"
            )

    @property
    def trainable_pattern(self) -> str:
        """Regular expression of the paths of the trainable parameters."""
        pattern = TRAIN_PATTERNS.get(self.train, self.train)
        parts = [pattern, self.saved_pattern, SOFT_PROMPT if self.soft_prompt and self.lora else ""]
        return "|".join(filter(None, parts))

    @property
    def saved_pattern(self) -> str:
        """Regular expression of the paths of the parameters of `modules_to_save`, "" for none."""
        modules = self.modules_to_save
        return rf"(?!.*/base/)(?:{modules})/(?:kernel|bias|scale|table)" if modules else ""

    @property
    def loggers(self) -> list[str]:
        """The names of the loggers."""
        return list(dict.fromkeys(["tensorboard"] * self.tensorboard + [*self.log]))

    @property
    def lora(self) -> bool:
        return "lora" in self.train

    @property
    def augments(self) -> bool:
        return self.flip > 0 or self.crop < 1 or self.color > 0
