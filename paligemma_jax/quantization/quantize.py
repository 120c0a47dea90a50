"""Quantize a model: replace its linear layers and its embedder by quantized ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from jaxtyping import PyTree

from convert.quantized import indivisible_note
from paligemma_jax.model.decoder import Embedder
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.model.tree import Model, modules
from paligemma_jax.quantization.calibrate import CalibrationInputs, Progress, calibrate
from paligemma_jax.quantization.modules import QuantizedLinear, quantize_modules


def quantize_model(
    model: Model,
    quantization: str | Quantization,
    calibration: Iterable[CalibrationInputs] | None = None,
    progress: Progress = iter,
) -> Model:
    """Quantize every part that `quantization` names, the cache included.

    Parts that are already quantized do not change. Neither does a matrix whose size is not a
    multiple of the block; a warning names it.

    Args:
        model: The model; with `calibration`, a PaliGemma with its layers as a list.
        calibration: Batches of complete rows, such as `processor(images, prompts, suffixes)`. The
            4-bit codes of the decoder's projections are then chosen by GPTQ for these inputs
            (`calibrate`) instead of by rounding; the format of the result is the same.
        progress: Wraps the sequence of layers that are calibrated.

    Raises:
        ValueError: There is nothing to calibrate, or nothing to calibrate with.
    """
    if isinstance(quantization, str):
        quantization = Quantization.parse(quantization)
    formats, indivisible = {}, []
    for path, module in modules(model, (Linear, Embedder)).items():
        format = quantization.at(path)
        if format is None or isinstance(module, QuantizedLinear):
            continue
        if format.fits(module.shape, looked_up=isinstance(module, Embedder)):
            formats[path] = format
        else:
            indivisible.append((path, module.shape))
    if indivisible:
        warnings.warn(indivisible_note(indivisible), stacklevel=2)
    parts = {}
    if calibration is not None:
        if quantization.decoder is None or not quantization.decoder.has_blocks:
            raise ValueError(
                "calibration requires a 4-bit format of the decoder, such as int4, got "
                f"{quantization.decoder or 'none'}"
            )
        parts = calibrate(model, formats, calibration, progress)  # type: ignore[arg-type]
    model = quantize_modules(model, formats, parts)
    cache = quantization.cache or model.config.cache  # type: ignore[attr-defined]
    model.config = replace(model.config, cache=cache)  # type: ignore[attr-defined]
    return model


def weight_formats(model: PyTree) -> dict[str, WeightFormat]:
    """The format of every quantized module of a model, stacked or not, by its path with the layer's
    number."""
    formats: dict[str, WeightFormat] = {}
    for path, module in modules(model, QuantizedLinear).items():
        if module.lead:
            for i in range(module.lead[0]):
                formats[path.replace("/layers/", f"/layers/{i}/")] = module.format
        else:
            formats[path] = module.format
    return formats
