"""Quantize a model: replace its linear layers and its embedder by quantized ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import jax
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from convert.quantized import indivisible_note
from paligemma_jax.model.codes import encode
from paligemma_jax.model.decoder import Embedder
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.model.tree import Model, modules, replace_modules
from paligemma_jax.quantization.modules import QuantizedEmbedder, QuantizedLinear


def quantize_modules(model: Model, formats: Mapping[str, WeightFormat]) -> Model:
    """The model with the modules at the paths of `formats` quantized. Works on stacked layers, and
    on shapes inside `jax.eval_shape`."""

    def make(path: str, module: nnx.Module) -> nnx.Module | None:
        format = formats.get(path)
        if format is None:
            return None
        if isinstance(module, Embedder):
            parts = encode(format, module.table[...], 1)
            return QuantizedEmbedder(format, module.axes, module.shape, 1, parts)
        assert isinstance(module, Linear)

        def encode_kernel(kernel: Array) -> dict[str, Array]:
            return encode(format, kernel, module.contracted)

        parts = (jax.vmap(encode_kernel) if module.lead else encode_kernel)(module.kernel[...])
        return QuantizedLinear(
            format, module.axes, module.shape, module.contracted, parts, module.bias
        )

    return replace_modules(model, make)


def quantize_model(model: Model, quantization: str | Quantization) -> Model:
    """Quantize every part that `quantization` names, the cache included.

    Parts that are already quantized do not change. Neither does a matrix whose size is not a
    multiple of the block; a warning names it.
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
    model = quantize_modules(model, formats)
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
