"""What is compared: a checkpoint whose tensors are read when they are asked for, and the inputs of both models."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.layout import layout_shape
from convert.match import Piece, pieces
from convert.quantized import dequantize_checkpoint
from convert.table import HUGGINGFACE
from convert.tensor import DTYPES, Index, Tensor, from_array
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.checkpoints.synthetic import synthetic_inputs, with_depth
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.processor import Inputs, Processor

DIGITS = str(Path(__file__).parents[1] / "assets" / "digits.jpg")
TEXTS = {"caption en": "four digits: 4, 3, 2 and 3", "detect 4": "<loc0722><loc0219><loc1023><loc0448> 4"}  # what to say of DIGITS, of two lengths


@dataclass(frozen=True)
class ParityCase:
    """One comparison. `directory`: of the config.json and tokenizer that transformers reads itself, if there is one."""

    checkpoint: Checkpoint
    directory: Path | None
    inputs: Inputs  # with suffixes where some are given
    asked: Inputs  # the same rows without
    processor: Processor | None = None
    texts: tuple[Any, ...] = ()  # images, prompts and suffixes of `inputs`, if it was made of such


def random_case(config: PaliGemmaConfig, prompt: int, suffix: int, seed: int = 0) -> ParityCase:
    """Random weights, pixels and ids for any config: nothing is needed, and a weight is in memory only while it is used."""
    whole = synthetic_inputs(config, 1, prompt + suffix, seed)
    targets = np.arange(whole.tokens.shape[1])[None] >= whole.tokens.shape[1] - suffix
    inputs = replace(whole, prefix=~targets, targets=targets)
    keep = slice(None, whole.tokens.shape[1] - suffix)
    asked = Inputs(whole.tokens[:, keep], whole.images, *(a[:, keep] for a in (inputs.valid, inputs.prefix, inputs.targets)))
    return ParityCase(random_checkpoint(config, seed), None, inputs, asked)


def random_checkpoint(config: PaliGemmaConfig, seed: int = 0) -> Checkpoint:
    """Every weight random, norms and biases too, such that mistakes show and that logits have a standard deviation of about 4."""
    found = pieces(HUGGINGFACE[config.decoder.model_type], config)
    tensors = {piece.path: piece.here(_random(piece, DTYPES[config.dtype], seed)) for piece in found}
    return Checkpoint("huggingface", config, tensors)


def _random(piece: Piece, dtype: np.dtype, seed: int) -> Tensor:
    """LayerNorms are around 1, RMSNorms around 0. Little is added by attention to so many random image tokens, else all tokens are alike."""
    sizes, path = layout_shape(piece.layout, piece.sizes), piece.path
    mean = {"decoder/norm/scale": 20.0}.get(path, 1.0 if path.startswith("vision") and path.endswith("scale") else 0.0)
    mean -= 0.7 * path.endswith("post_attention_norm/scale")
    std = 0.3 if len(sizes) == 1 else np.prod(sizes[1:]) ** -0.5 * (0.2 if path.endswith("table") else 1.0)

    def raw(index: Index) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        values = rng.standard_normal(sizes, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return values[index].astype(dtype, copy=False) if index else values.astype(dtype, copy=False)

    return Tensor(sizes, dtype, raw)


def load_parity_case(
    model: str, numerics: str | None, images: tuple[str, ...], prompts: tuple[str, ...], suffixes: tuple[str, ...], depth: int | None
) -> ParityCase:
    """The case of a checkpoint or, with random weights and inputs, of a preset; ValueError if what is given does not fit together.

    Without images and prompts, those are the embedded picture and `TEXTS`.
    """
    if model in PRESETS and model != "tiny":
        if images or prompts or suffixes:
            raise ValueError(f"{model} has random weights and no tokenizer, so it takes no --image, --prompt and --suffix")
        config = replace(PRESETS[model], numerics=numerics or "transformers")
        return random_case(with_depth(config, depth) if depth else config, 16, 8)
    source = resolve(model, (name for name in PRESETS if name != "tiny"))
    if depth:
        raise ValueError(f"--depth is for the random weights of a preset; {model} is a checkpoint")
    processor = make_processor(source)
    if not images and not prompts and not suffixes:
        images, prompts, suffixes = (DIGITS,) * len(TEXTS), tuple(TEXTS), tuple(TEXTS.values())
    if not images or not prompts:
        raise ValueError(f"no {'prompt' if images else 'image'}: give --image and --prompt, or neither for the embedded ones")
    images = images * len(prompts) if len(images) == 1 and not any("<image>" in prompt for prompt in prompts) else images
    texts = (list(images), list(prompts), list(suffixes) or None)
    return ParityCase(_read(source).with_numerics(numerics), source.tokenizer_dir, processor(*texts), processor(*texts[:2]), processor, texts)


def _read(source: CheckpointSource) -> Checkpoint:
    """The checkpoint; of an adapter the model with it merged, of a quantized one with its matrices made whole."""
    if source.adapter is None:
        checkpoint = source.checkpoint
        return dequantize_checkpoint(checkpoint) if checkpoint.formats else checkpoint
    model = load_model(source)
    return Checkpoint("jax", model.config, {path: from_array(array) for path, array in parameters(model).items()})
