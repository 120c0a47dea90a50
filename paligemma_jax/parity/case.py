"""A parity case: a checkpoint whose tensors are read on demand, and inputs for both models."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.match import Weight, huggingface_weights
from convert.quantized import dequantize_checkpoint
from convert.tensor import DTYPES, Index, Tensor, from_array
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.checkpoints.synthetic import synthetic_inputs, with_depth
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.processor import Inputs, Processor

DIGITS = str(Path(__file__).parents[1] / "assets" / "digits.jpg")
# Prompts about DIGITS and their suffixes, of two lengths.
EXAMPLES = {
    "caption en": "four digits: 4, 3, 2 and 3",
    "detect 4": "<loc0722><loc0219><loc1023><loc0448> 4",
}


@dataclass(frozen=True)
class ParityCase:
    """The weights and inputs of one comparison."""

    checkpoint: Checkpoint
    directory: Path | None  # with a config.json and tokenizer, which transformers reads itself
    inputs: Inputs  # with suffixes, if any
    prompts: Inputs  # the same rows without suffixes
    processor: Processor | None = None
    # The image files, prompts and suffixes that `inputs` was made from.
    examples: tuple[list[str], list[str], list[str] | None] | None = None

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
    return ParityCase(random_checkpoint(config, seed), None, inputs, prompts)


def random_checkpoint(config: PaliGemmaConfig, seed: int = 0) -> Checkpoint:
    """Make random weights, norms and biases included, so that mistakes show. The logits have a
    standard deviation of about 4."""
    dtype = DTYPES[config.dtype]
    tensors = {
        weight.path: weight.from_file(_random_tensor(weight, dtype, seed))
        for weight in huggingface_weights(config)
    }
    return Checkpoint("huggingface", config, tensors)


def _random_tensor(weight: Weight, dtype: np.dtype, seed: int) -> Tensor:
    """LayerNorm scales are drawn around 1, RMSNorm scales around 0. Attention adds little, since
    averages over many random image tokens would make all tokens similar."""
    shape, path = weight.file_shape, weight.path
    mean = 1.0 if path.startswith("vision") and path.endswith("scale") else 0.0
    if path == "decoder/norm/scale":
        mean = 20.0
    elif path.endswith("post_attention_norm/scale"):
        mean -= 0.7
    std = 0.3
    if len(shape) > 1:
        std = np.prod(shape[1:]) ** -0.5 * (0.2 if path.endswith("table") else 1.0)

    def read(index: Index) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return (
            values[index].astype(dtype, copy=False) if index else values.astype(dtype, copy=False)
        )

    return Tensor(shape, dtype, read)


def load_parity_case(
    model: str,
    numerics: str | None = None,
    images: tuple[str, ...] = (),
    prompts: tuple[str, ...] = (),
    suffixes: tuple[str, ...] = (),
    depth: int | None = None,
) -> ParityCase:
    """The case of a checkpoint, or of a preset with random weights and inputs.

    Without images and prompts, a checkpoint is compared on the embedded picture and `EXAMPLES`.

    Raises:
        ValueError: The arguments do not fit together.
    """
    if model in PRESETS and model != "tiny":
        if images or prompts or suffixes:
            raise ValueError(
                f"{model} has random weights and no tokenizer: "
                "leave out --image, --prompt and --suffix"
            )
        config = replace(PRESETS[model], numerics=numerics or "transformers")
        return random_case(with_depth(config, depth) if depth else config, 16, 8)
    source = resolve(model, (name for name in PRESETS if name != "tiny"))
    if depth:
        raise ValueError(f"--depth needs a preset with random weights; {model} is a checkpoint")
    processor = make_processor(source)
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
    examples = (list(images), list(prompts), list(suffixes) or None)
    return ParityCase(
        _open_dense(source).with_numerics(numerics),
        source.tokenizer_dir,
        processor(*examples),
        processor(*examples[:2]),
        processor,
        examples,
    )


def _open_dense(source: CheckpointSource) -> Checkpoint:
    """The checkpoint with an adapter merged and quantized matrices dequantized."""
    if source.adapter is None:
        checkpoint = source.checkpoint
        return dequantize_checkpoint(checkpoint) if checkpoint.formats else checkpoint
    model = load_model(source)
    tensors = {path: from_array(array) for path, array in parameters(model).items()}
    return Checkpoint("jax", model.config, tensors)
