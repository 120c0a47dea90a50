"""Models and inputs without files: random weights for any preset, random images and tokens."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from convert.match import huggingface_weights
from convert.quantized import indivisible_note, quantizable_matrices
from paligemma_jax.checkpoints.load import abstract_model, load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.model.codes import encode
from paligemma_jax.model.config import (
    PRESETS,
    AttentionForm,
    DecoderConfig,
    PaliGemmaConfig,
    VisionConfig,
)
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.devices import choose_attention

SMALL_CONFIG = PaliGemmaConfig(
    VisionConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024
    ),
    DecoderConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        vocab_size=16384,
        query_pre_attn_scalar=64,
    ),
    image_token_id=16000,
)
RANDOM_CONFIGS = {name: config for name, config in PRESETS.items() if name != "tiny"}
RANDOM_CONFIGS["small"] = SMALL_CONFIG


def model_by_name(
    name: str,
    dtype: str,
    depth: int | None = None,
    quantize: str | None = None,
    attention: str | None = None,
) -> PaliGemma:
    """Make a model of random weights if `name` is in `RANDOM_CONFIGS`, else load a checkpoint.

    Args:
        name: A preset, "small", or a reference to a checkpoint (see `resolve`).
        dtype: Dtype of parameters and activations.
        depth: Number of layers in each tower, for random weights only.
        quantize: What to quantize (see `Quantization`).
        attention: As for `load_model`.
    """
    if name in RANDOM_CONFIGS:
        config = replace(_random_config(name, dtype, depth), attention=choose_attention(attention))
        return random_model(config, quantization=Quantization.parse(quantize))
    source = resolve(name, RANDOM_CONFIGS)
    if depth:
        raise ValueError(f"--depth requires random weights, but {name} is a checkpoint")
    return load_model(source, dtype, quantize=quantize, attention=attention)


def abstract_model_by_name(
    name: str, dtype: str, depth: int | None = None, attention: AttentionForm = "plain"
) -> PaliGemma:
    """Like `model_by_name`, with shapes in place of arrays: no weights are made or read."""
    formats: dict[str, WeightFormat] = {}
    if name in RANDOM_CONFIGS:
        config = _random_config(name, dtype, depth)
    else:
        checkpoint = resolve(name, RANDOM_CONFIGS).checkpoint
        config, formats = replace(checkpoint.config, dtype=dtype), checkpoint.formats
    return abstract_model(replace(config, attention=attention), formats, dtype)


def with_depth(config: PaliGemmaConfig, layers: int) -> PaliGemmaConfig:
    """Return the config with `layers` layers in each tower."""
    vision = replace(config.vision, num_hidden_layers=layers)
    return replace(config, vision=vision, decoder=replace(config.decoder, num_hidden_layers=layers))


def random_model(
    config: PaliGemmaConfig, seed: int = 0, quantization: Quantization = Quantization()
) -> PaliGemma:
    """Make a model of random weights, one parameter at a time, on the device, in its final dtype.

    Matrices have variance 1/fan_in, norms have unit scale, and biases are 0. Each matrix selected
    by `quantization` is quantized before the next is made. A matrix whose size is not a multiple of
    the block keeps its dtype, with a warning.
    """
    file_shapes = {weight.path: weight.file_shape for weight in huggingface_weights(config)}
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 10_000))

    def make(path: str, shape: tuple[int, ...]) -> Array:
        fan_in = file_shapes[path][1:]
        if fan_in:
            std = math.prod(fan_in) ** -0.5
            return _uniform(next(keys), std, shape=shape, dtype=config.dtype)
        is_layer_norm_scale = path.startswith("vision") and path.endswith("scale")
        return jnp.full(shape, is_layer_norm_scale, config.dtype)

    matrices = quantizable_matrices(config)
    formats, arrays, indivisible = {}, {}, []
    for path, leaf in parameters(abstract_model(config)).items():
        array, matrix = make(path, leaf.shape), matrices.get(path)
        format = quantization.at(matrix.module) if matrix else None
        if matrix is None or format is None:
            arrays[path] = array
        elif matrix.fits(format):
            formats[matrix.module] = format
            parts = encode(format, array, matrix.contracted)
            arrays |= {f"{matrix.module}/{name}": part for name, part in parts.items()}
        else:
            arrays[path] = array
            indivisible.append((matrix.module, matrix.shape))
    if indivisible:
        warnings.warn(indivisible_note(indivisible), stacklevel=2)
    model = abstract_model(replace(config, cache=quantization.cache), formats)
    return with_parameters(model, arrays.pop)


def synthetic_inputs(config: PaliGemmaConfig, batch: int, prompt: int, seed: int = 0) -> Inputs:
    """Make inputs of `batch` rows, each with a random image and `prompt` random text tokens."""
    rng, size, patches = (
        np.random.default_rng(seed),
        config.vision.image_size,
        config.vision.num_patches,
    )
    text = rng.integers(2, min(config.image_token_id, config.decoder.vocab_size), (batch, prompt))
    image = np.full((batch, patches), config.image_token_id)
    tokens = np.concatenate([image, text], axis=1).astype(np.int32)
    images = rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
    everywhere = np.ones_like(tokens, bool)
    return Inputs(tokens, images, everywhere, everywhere, ~everywhere)


def _random_config(name: str, dtype: str, depth: int | None) -> PaliGemmaConfig:
    config = replace(RANDOM_CONFIGS[name], dtype=dtype)
    return with_depth(config, depth) if depth else config


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _uniform(key: Array, std: float, shape: tuple[int, ...], dtype: str) -> Array:
    """Draw uniform numbers with this standard deviation; normal ones take three times as long."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * jnp.asarray(3**0.5 * std, dtype)
