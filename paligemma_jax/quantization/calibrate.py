"""Calibrate a decoder: run inputs through it layer by layer, and quantize each layer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from paligemma_jax.model.decoder import Block
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.masks import TokenSpan, token_span
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import WeightFormat
from paligemma_jax.model.tree import modules, replace_modules
from paligemma_jax.quantization.gptq import encode_calibrated, highest
from paligemma_jax.quantization.modules import quantize_modules

# How often a text token counts in the moments; an image token counts once. There are many more
# image tokens: with a weight of 1, the logit error of `tiny` in int4-64 is 0.041, with 4 0.036
# (four tasks, two sets of 128 rows).
TEXT_WEIGHT = 4.0

Parts = dict[str, Array]
Progress = Callable[[Sequence[Block]], Iterable[Block]]


class CalibrationInputs(Protocol):
    """A batch of complete rows: image, prompt and answer (`processing.processor.Inputs`)."""

    @property
    def tokens(self) -> Array | np.ndarray: ...
    @property
    def images(self) -> Array | np.ndarray | None: ...
    @property
    def valid(self) -> Array | np.ndarray: ...
    @property
    def prefix(self) -> Array | np.ndarray: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """A batch on its way through the layers."""

    x: Array  # [B, T, D]
    span: TokenSpan
    weight: Array  # float32[B, T], 0 on pads


def calibrate(
    model: PaliGemma,
    formats: Mapping[str, WeightFormat],
    batches: Iterable[CalibrationInputs],
    progress: Progress = iter,
) -> dict[str, Parts]:
    """Quantize the decoder's projections at the paths of `formats` (4 bits) with GPTQ.

    The inputs of a layer are those that the quantized layers before it compute. In memory beside
    the model: the activations of all rows before one layer, and the moments of one layer, float32,
    of which the largest is [F, F]; GPTQ needs four arrays of that size.

    Args:
        model: A model with its layers as a list.
        batches: Each is read once.
        progress: Wraps the sequence of layers.

    Returns:
        The parts of each matrix, by path.

    Raises:
        ValueError: There are no batches, or the layers are stacked.
    """
    if not isinstance(model.decoder.layers, Sequence):
        raise ValueError(
            "calibration requires the layers as a list, got stacked layers: unstack them with "
            "paligemma_jax.model.stack.unstack_model"
        )
    states = [
        _embed(model, batch.tokens, batch.images, batch.valid, batch.prefix) for batch in batches
    ]
    if not states:
        raise ValueError("calibration must have at least one batch, got none")
    windows = jnp.array(model.config.decoder.windows(model.config.profile), jnp.int32)
    parts: dict[str, Parts] = {}
    for i, block in enumerate(progress(model.decoder.layers)):
        moments: dict[str, Array] = {}
        for state in states:
            new = _moments(block, state, windows[i])
            moments = jax.tree.map(jnp.add, moments, new) if moments else new
        prefix = f"decoder/layers/{i}/"
        chosen = {path: formats[prefix + path] for path in moments if prefix + path in formats}
        encoded = {
            path: encode_calibrated(format, linear.kernel[...], moments.pop(path))
            for path, linear in modules(block, Linear).items()
            if (format := chosen.get(path))
        }
        parts |= {prefix + path: value for path, value in encoded.items()}
        block = quantize_modules(block, chosen, encoded)
        states = [_run(block, state, windows[i]) for state in states]
    return parts


@jax.jit
def _embed(
    model: PaliGemma, tokens: Array, images: Array | None, valid: Array, prefix: Array
) -> _State:
    features = None if images is None else model.encode_images(images)
    span = token_span(valid, prefix, model.config.profile.first_position)
    is_image = tokens == model.config.image_token_id
    weight = jnp.where(is_image, 1.0, TEXT_WEIGHT) * valid
    return _State(model.embed(tokens, features), span, weight)


class _Recorder(nnx.Module):
    """A `Linear` that records its input while it is traced."""

    def __init__(self, linear: Linear, record: Callable[[Array], None]):
        self.linear, self.record = linear, record

    def __call__(self, x: Array) -> Array:
        self.record(x)
        return self.linear(x)


@jax.jit
def _moments(block: Block, state: _State, window: Array) -> dict[str, Array]:
    """The second moments float32[I, I] of the inputs of every `Linear`, by its path."""
    weight = state.weight.reshape(-1, 1)
    moments: dict[str, Array] = {}

    def record(path: str, module: nnx.Module) -> nnx.Module | None:
        def add(x: Array) -> None:
            rows = x.reshape(weight.size, -1).astype(jnp.float32)
            moments[path] = highest(rows.T, rows * weight)

        return _Recorder(module, add) if isinstance(module, Linear) else None

    replace_modules(block, record)(state.x, state.span, window, None)
    return moments


@jax.jit
def _run(block: Block, state: _State, window: Array) -> _State:
    x, _ = block(state.x, state.span, window, None)
    return _State(x, state.span, state.weight)
