"""Models and inputs without files: random weights for any preset, made where they are used; random images and ids."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from convert import formats
from convert.layout import layout_shape
from convert.match import pieces
from convert.quantized import indivisible_note, quantizable_matrices
from convert.table import HUGGINGFACE
from paligemma_jax.checkpoints.load import abstract_model, load_model
from paligemma_jax.checkpoints.source import resolve, under
from paligemma_jax.model.codes import encode
from paligemma_jax.model.config import PRESETS, DecoderConfig, PaliGemmaConfig, VisionConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.quantization.quantize import quantize_modules

SMALL_CONFIG = PaliGemmaConfig(
    VisionConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024),
    DecoderConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=1024,
        vocab_size=16384, query_pre_attn_scalar=64,
    ),
    image_token_id=16000,
)  # fmt: skip
RANDOM_CONFIGS = {name: config for name, config in PRESETS.items() if name != "tiny"} | {"small": SMALL_CONFIG}


def load_or_random(name: str, dtype: str, depth: int | None = None, quantize: str | None = None) -> PaliGemma:
    """A model of random weights for a preset name or "small", else that of a checkpoint; `depth`: with that many layers in each tower."""
    if name not in RANDOM_CONFIGS:
        place = resolve(name, RANDOM_CONFIGS)
        if depth:
            raise ValueError(f"--depth is for random weights; {name} is a checkpoint")
        return load_model(place, dtype, quantize=quantize)
    return random_model(_config(name, dtype, depth), how=Quantization.parse(quantize))


def abstract_or_random(name: str, dtype: str, depth: int | None = None) -> PaliGemma:
    """`load` with shapes in the place of arrays: whatever its size, it costs nothing."""
    source = None if name in RANDOM_CONFIGS else formats.read(under(resolve(name, RANDOM_CONFIGS)))
    values = parameters(model := abstract_model(replace(source.config, dtype=dtype) if source else _config(name, dtype, depth)))
    model = with_parameters(model, lambda path: jax.ShapeDtypeStruct(values[path].shape, dtype))
    return jax.eval_shape(partial(quantize_modules, formats=source.formats), model) if source else model


def _config(name: str, dtype: str, depth: int | None) -> PaliGemmaConfig:
    config = replace(RANDOM_CONFIGS[name], dtype=dtype)
    return with_depth(config, depth) if depth else config


def with_depth(config: PaliGemmaConfig, layers: int) -> PaliGemmaConfig:
    """The config with so many layers in each tower."""
    return replace(config, **{tower: replace(getattr(config, tower), num_hidden_layers=layers) for tower in ("vision", "decoder")})


def random_model(config: PaliGemmaConfig, seed: int = 0, how: Quantization = Quantization()) -> PaliGemma:
    """Weights of variance 1/fan_in, norms that do nothing, biases of 0; made on the device one by one, in the config's dtype from the start.

    how: each is quantized before the next is made; what blocks do not divide stays as it is, which a warning tells.
    """
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 10_000))
    sizes = {piece.path: layout_shape(piece.layout, piece.sizes) for piece in pieces(HUGGINGFACE[config.decoder.model_type], config)}
    model = abstract_model(config)
    shapes = {path: leaf.shape for path, leaf in parameters(model).items()}

    def make(path: str) -> Array:
        if len(sizes[path]) > 1:
            return _uniform(next(keys), math.prod(sizes[path][1:]) ** -0.5, shape=shapes[path], dtype=config.dtype)
        return jnp.full(shapes[path], path.startswith("vision") and path.endswith("scale"), config.dtype)

    known, held, arrays, whole = quantizable_matrices(config), {}, {}, []
    for path in shapes:
        array, matrix = make(path), known.get(path)
        format = how.at(matrix.where) if matrix else None
        if matrix and format and format.fits(matrix.shape, matrix.looked_up):
            held[matrix.where] = format
            arrays |= {f"{matrix.where}/{name}": part for name, part in encode(format, array, matrix.contracted).items()}
        else:
            arrays[path] = array
            whole += [(matrix.where, matrix.shape)] if matrix and format else []
    if whole:
        warnings.warn(indivisible_note(whole), stacklevel=2)
    model.config = replace(config, cache=how.cache)
    return with_parameters(jax.eval_shape(partial(quantize_modules, formats=held), model), arrays.pop)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _uniform(key: Array, std: float, shape: tuple[int, ...], dtype: str) -> Array:
    """Of this standard deviation; a third of the time that a normal distribution takes."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * jnp.asarray(3**0.5 * std, dtype)






def synthetic_inputs(config: PaliGemmaConfig, batch: int, prompt: int, seed: int = 0) -> Inputs:
    """`batch` rows of one random image and `prompt` random text tokens."""
    rng, size = np.random.default_rng(seed), config.vision.image_size
    text = rng.integers(2, min(config.image_token_id, config.decoder.vocab_size), (batch, prompt))
    tokens = np.concatenate([np.full((batch, config.vision.num_patches), config.image_token_id), text], axis=1).astype(np.int32)
    images = rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
    yes = np.ones_like(tokens, bool)
    return Inputs(tokens, images, yes, yes, ~yes)
