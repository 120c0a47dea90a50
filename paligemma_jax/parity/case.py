"""A parity case: a checkpoint whose tensors are read on demand, and inputs for both models."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

import jax
import numpy as np

from convert import formats
from convert.checkpoint import Checkpoint
from convert.quantized import dequantize_checkpoint
from convert.tensor import Index, Tensor
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.checkpoints.synthetic import synthetic_inputs, with_depth
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig
from paligemma_jax.model.tree import parameters
from paligemma_jax.parity.random_weights import random_checkpoint
from paligemma_jax.parity.torch_processor import TorchProcessor
from paligemma_jax.processing.processor import Inputs, Processor

DIGITS = str(Path(__file__).parents[1] / "assets" / "digits.jpg")
# Prompts about DIGITS and their suffixes, of two lengths.
EXAMPLES = {
    "caption en": "four digits: 4, 3, 2 and 3",
    "detect 4": "<loc0722><loc0219><loc1023><loc0448> 4",
}
RANDOM_PRESETS = [name for name in PRESETS if name != "tiny"]


@dataclass(frozen=True)
class Examples:
    """Image files and texts, and the processors of both sides."""

    images: list[str]
    prompts: list[str]
    suffixes: list[str] | None
    ours: Processor
    theirs: TorchProcessor


@dataclass(frozen=True)
class ParityCase:
    """The weights and inputs of one comparison.

    Stages are compared on transformers' inputs, so that they tell of weights and computation alone.
    The results of the complete model are compared from the inputs that each side made.
    """

    checkpoint: Checkpoint  # of this model
    inputs: Inputs  # made by transformers, with suffixes, if any
    prompts: Inputs  # the same rows without suffixes
    # What transformers reads by itself. None: it computes with the tensors of `checkpoint`.
    source: CheckpointSource | None = None
    directory: Path | None = None  # may have a config.json, which transformers then reads itself
    own: tuple[Inputs, Inputs] | None = None  # inputs and prompts made here, unless they are those
    examples: Examples | None = None  # what the inputs were made from, unless they are random

    @property
    def own_inputs(self) -> Inputs:
        """The inputs made here."""
        return self.own[0] if self.own else self.inputs

    @property
    def own_prompts(self) -> Inputs:
        """The prompts made here."""
        return self.own[1] if self.own else self.prompts

    @property
    def image_count(self) -> int:
        return 0 if self.inputs.images is None else len(self.inputs.images)


def random_case(config: PaliGemmaConfig, prompt: int, suffix: int, seed: int = 0) -> ParityCase:
    """Make random weights (on use), pixels and ids for any config. Needs no files."""
    inputs = synthetic_inputs(config, 1, prompt + suffix, seed)
    length = inputs.tokens.shape[1] - suffix
    targets = np.broadcast_to(np.arange(length + suffix) >= length, inputs.tokens.shape)
    inputs = replace(inputs, prefix=~targets, targets=targets)
    fields = ("tokens", "valid", "prefix", "targets")
    prompts = replace(inputs, **{name: getattr(inputs, name)[:, :length] for name in fields})
    return ParityCase(random_checkpoint(config, seed), inputs, prompts)


def load_parity_case(
    model: str,
    numerics: str | None = None,
    images: tuple[str, ...] = (),
    prompts: tuple[str, ...] = (),
    suffixes: tuple[str, ...] = (),
    depth: int | None = None,
    against: str | None = None,
) -> ParityCase:
    """The case of a checkpoint, or of a preset with random weights and inputs.

    Without images and prompts, a checkpoint is compared on the embedded picture and `EXAMPLES`.

    Args:
        model: The checkpoint that this model loads.
        against: The Hugging Face directory or adapter that transformers loads; by default `model`.

    Raises:
        ValueError: The arguments do not fit together, or one side cannot load its files.
    """
    if model in RANDOM_PRESETS:
        if images or prompts or suffixes or against:
            raise ValueError(
                f"{model} has random weights and no tokenizer: "
                "leave out --image, --prompt, --suffix and --against"
            )
        config = replace(PRESETS[model], numerics=numerics or "transformers")
        return random_case(with_depth(config, depth) if depth else config, 16, 8)
    source = resolve(model, RANDOM_PRESETS)
    if depth:
        raise ValueError(f"--depth needs a preset with random weights; {model} is a checkpoint")
    reference = reference_source(source, against)
    examples = _load_examples(source, reference or source, images, prompts, suffixes)
    rows = (examples.images, examples.prompts, examples.suffixes)
    return ParityCase(
        open_dense(source).with_numerics(numerics),
        examples.theirs(*rows),
        examples.theirs(*rows[:2]),
        reference,
        source.tokenizer_dir,
        (examples.ours(*rows), examples.ours(*rows[:2])),
        examples,
    )


def reference_source(source: CheckpointSource, against: str | None) -> CheckpointSource | None:
    """What transformers loads. None if that is the model, in a format that it cannot read."""
    reference = resolve(against) if against else source
    if reference.state is None and formats.detect_format(reference.weights) == "huggingface":
        return reference
    if against:
        raise ValueError(
            f"--against must be a Hugging Face directory or an adapter on one, got {against}: "
            "transformers cannot read its format"
        )
    return None


def _load_examples(
    source: CheckpointSource,
    reference: CheckpointSource,
    images: tuple[str, ...],
    prompts: tuple[str, ...],
    suffixes: tuple[str, ...],
) -> Examples:
    if not images and not prompts and not suffixes:
        images = (DIGITS,) * len(EXAMPLES)
        prompts, suffixes = tuple(EXAMPLES), tuple(EXAMPLES.values())
    if not images or not prompts:
        missing = "--prompt" if images else "--image"
        raise ValueError(
            f"{missing} is missing: give --image and --prompt, or neither for the embedded examples"
        )
    if len(images) == 1 and not any("<image>" in prompt for prompt in prompts):
        images = images * len(prompts)
    ours = make_processor(source)
    theirs = TorchProcessor.load(reference.tokenizer_dir, source.config.vision)
    return Examples(list(images), list(prompts), list(suffixes) or None, ours, theirs)


class _DenseSource(CheckpointSource):
    """A source whose quantized matrices are dequantized when they are read."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        checkpoint = super().checkpoint
        return dequantize_checkpoint(checkpoint) if checkpoint.formats else checkpoint


def open_dense(source: CheckpointSource) -> Checkpoint:
    """The checkpoint with quantized matrices dequantized, and an adapter merged on use."""
    source = _DenseSource(*(getattr(source, field.name) for field in fields(source)))
    checkpoint = source.checkpoint
    if not source.has_adapter:
        return checkpoint
    adapter = source.delta  # refuses it before transformers runs
    if adapter and adapter.soft_tokens:
        raise ValueError(
            f"{source.reference} has a {adapter.soft_kind}, which transformers alone cannot run: "
            f"compare its base, {source.weights}"
        )

    @cache
    def merged() -> dict[str, jax.Array]:
        return parameters(load_model(source, "float32"))

    def merged_tensor(path: str, tensor: Tensor) -> Tensor:
        def read(index: Index) -> np.ndarray:
            return np.asarray(merged()[path])[index]

        return Tensor(tensor.shape, np.dtype("float32"), read)

    tensors = {path: merged_tensor(path, tensor) for path, tensor in checkpoint.tensors.items()}
    return Checkpoint("jax", replace(checkpoint.config, dtype="float32"), tensors)
