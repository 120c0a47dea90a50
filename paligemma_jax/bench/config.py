"""The flags of `paligemma-jax bench`. Does not import jax, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from paligemma_jax.model.config import AttentionForm
from paligemma_jax.model.precision import Quantization

DTYPES = ("float32", "bfloat16", "float16")


def _arg(metavar: str, default: str | None = None):
    """Return a flag's metavar, with its default in the help."""
    hint = f"(default: {default})" if default else None
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Numbers = Annotated[tuple[int, ...], _arg("N [N ...]")]
EMPTY = tyro.conf.arg(help_behavior_hint="(default: none)")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every combination of model, layers, batch and prompt."""

    model: Annotated[tuple[str, ...], _arg("NAME [NAME ...]")] = ("tiny",)
    """A preset (3b-224, 10b-448, 28b-896, pg1-3b-224, ...) or "small" with random weights, or a
    checkpoint as for generate."""
    batch: Numbers = (1,)
    """Batch sizes."""
    prompt: Numbers = (32,)
    """Text tokens in the prompt, in addition to the image tokens (256 at 224 pixels)."""
    new: int = 64
    """Tokens to generate; with --train, tokens of the answer."""
    layers: tuple[Literal["list", "stack"], ...] = ("list",)
    """Compile every layer (list), or one layer that a loop runs (stack)."""
    attention: Annotated[tuple[AttentionForm, ...], _arg("FORM [FORM ...]", "fastest")] = ()
    """Forms of attention to compare: fused (scores stay on the chip; on TPUs and GPUs) or plain."""
    cached: Annotated[tuple[int, ...], _arg("N [N ...]", "none")] = ()
    """Also time decoding with this many tokens in the cache."""
    against: Annotated[tuple[Literal["transformers", "transformers-compile"], ...], EMPTY] = ()
    """Compare with transformers, or with transformers and torch.compile, on the same weights, dtype
    and inputs. Runs alternate."""
    dtype: Annotated[str | None, _arg("NAME", "bfloat16; float32 on a CPU")] = None
    """Dtype of parameters and activations: float32, bfloat16 or float16."""
    quantize: Annotated[tuple[str, ...], _arg("FORMAT [FORMAT ...]", "none")] = ()
    """Storage formats to compare: none, int8, w8a8, nf4, or a list by part, such as
    nf4-32,embedding=int8,cache=int8."""
    depth: Annotated[int | None, _arg("N", "all")] = None
    """Number of layers in each tower, at full width, for models that do not fit into memory."""
    repeats: int = 5
    """Number of timed runs, after one warmup run."""
    train: Annotated[tuple[Literal["all", "lora", "qlora"], ...], EMPTY] = ()
    """Measure training steps instead of generation: of all weights, LoRA, or LoRA on nf4. With
    --repeats 0, only compile and report the memory."""
    remat: Literal["none", "full", "outputs", "dots"] = "none"
    """What the backward pass of --train recomputes to save memory: nothing, each layer (full), or
    each layer except the outputs of attention and MLP, or its matrix products (dots)."""

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quantize and (self.against or self.train):
            raise ValueError(
                "--quantize measures generation alone: leave out --against and --train "
                "(--train qlora uses nf4)"
            )
        for quantization in self.quantize:
            Quantization.parse(quantization)
        for flag, values, minimum in (
            ("--batch", self.batch, 1),
            ("--prompt", self.prompt, 1),
            ("--cached", self.cached, 1),
            ("--new", (self.new,), 2),
            ("--depth", (self.depth or 1,), 1),
            ("--repeats", (self.repeats,), 0 if self.train else 1),
        ):
            if min(values, default=minimum) < minimum:
                raise ValueError(f"{flag} must be at least {minimum}, got {min(values)}")
