"""Weights in 8 or 4 bits, by wrapping: `Quantized` stands in the place of an `Einsum`, is called the same, and does not learn.

The arithmetic is in `model/codes.py`, the formats and their names in `model/precision.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from convert.quantized import undivided
from paligemma_jax.model.codes import decode, encode, multiply, scales
from paligemma_jax.model.decoder import Embedder
from paligemma_jax.model.layers import Einsum, biased, place, product, swap
from paligemma_jax.model.precision import Format, Quantization


class Quantized(nnx.Module):
    """An `Einsum` whose kernel is held in parts (`model/codes.py`); `axes`, `shape`, `contracted`, `bias`, a stack's leading axes are as there."""

    def __init__(self, format: Format, axes: str, shape: tuple[int, ...], contracted: int, parts: Mapping[str, Array], bias: Any = None):
        self.format, self.axes, self.shape, self.contracted, self.bias = format, axes, shape, contracted, bias
        self.codes, self.scale = nnx.Param(parts["codes"]), nnx.Param(parts["scale"])
        self.nested = nnx.Param(parts["nested"]) if "nested" in parts else None

    @property
    def parts(self) -> dict[str, Array]:
        held = {"codes": self.codes, "scale": self.scale, "nested": self.nested}
        return {name: param[...] for name, param in held.items() if param is not None}

    @property
    def lead(self) -> tuple[int, ...]:
        """A stack's leading axes."""
        return self.codes.shape[: self.codes.ndim - len(self.shape)]

    def dense(self, dtype: Any) -> Array:
        return decode(self.format, self.parts, self.shape).astype(dtype)

    def __call__(self, x: Array) -> Array:
        outs, ins = self.shape[: -self.contracted], self.shape[-self.contracted :]
        if self.format.kind != "int8" and math.prod(ins) % self.format.block:  # blocks run over the ends of rows
            dense = lambda x: product(x, self.dense(x.dtype), self.contracted, jnp.float32)
            return biased(jax.checkpoint(dense)(x), self.bias).astype(x.dtype)
        # Checkpointed: or else the backward pass would hold the whole kernel of every layer.
        y = jax.checkpoint(self.times)(x.reshape(*x.shape[: x.ndim - len(ins)], -1), self.codes[...], scales(self.parts))
        return biased(y.reshape(*y.shape[:-1], *outs), self.bias).astype(x.dtype)  # rounded once, as in `Einsum`

    def times(self, x: Array, codes: Array, scale: Array) -> Array:
        """x [..., I] times codes [out..., in...] (or as many of them) and their float32 scales -> float32 [..., O].

        What is split along D or W is made whole first: between the devices of a fully sharded model go codes, not the numbers that they stand for.
        """
        axes = " ".join(self.axes.replace("D", "-").replace("W", "-"))
        codes, scale = place(axes, codes), place(axes, scale)
        rows = math.prod(codes.shape[: -self.contracted])
        return multiply(self.format, x, codes.reshape(rows, -1), scale.reshape(rows, *[-1] * (self.format.kind != "int8")))


class QuantizedEmbedder(Quantized, Embedder):
    """An `Embedder` whose table is held in parts."""

    def rows(self, tokens: Array, dtype: Any) -> Array:
        codes, scale = self.codes[...][tokens], scales(self.parts)[tokens]
        return decode(self.format, {"codes": codes, "scale": scale}, (*tokens.shape, self.shape[1])).astype(dtype)

    def decode(self, x: Array, part: Array | int = 0, parts: int = 1) -> Array:
        held = (self.codes[...], scales(self.parts))
        codes, scale = (a if parts == 1 else a.reshape(-1, parts, *a.shape[1:])[:, part] for a in held)
        return jax.checkpoint(self.times)(x, codes, scale)


def hold(model: Any, formats: Mapping[str, Format]) -> Any:
    """The model, of arrays or of shapes inside `jax.eval_shape`, stacked or not, with the modules at the paths of `formats` quantized so."""

    def make(path: str, module: Any) -> Any:
        if (format := formats.get(path)) is None:
            return None
        embedder = isinstance(module, Embedder)
        matrix, contracted = (module.table[...], 1) if embedder else (module.kernel[...], module.contracted)
        of = lambda matrix: encode(format, matrix, contracted)
        for _ in range(matrix.ndim - len(module.shape)):
            of = jax.vmap(of)
        if embedder:
            return QuantizedEmbedder(format, module.axes, module.shape, contracted, of(matrix))
        return Quantized(format, module.axes, module.shape, contracted, of(matrix), module.bias)

    return swap(model, make)


def quantize(model: Any, how: str | Quantization) -> Any:
    """`hold` with all that `how` names (`Quantization.of`), and its cache. What is quantized already stays.

    So does what blocks do not divide, which a warning tells.
    """
    how, formats, whole = Quantization.of(how) if isinstance(how, str) else how, {}, []

    def look(path: str, module: Any) -> None:
        if isinstance(module, Einsum | Embedder) and not isinstance(module, Quantized) and (format := how.at(path)):
            if format.fits(module.shape, looked_up=isinstance(module, Embedder)):
                formats[path] = format
            else:
                whole.append((path, module.shape))

    swap(model, look)
    if whole:
        warnings.warn(undivided(whole), stacklevel=2)
    model = hold(model, formats)
    model.config = replace(model.config, cache=how.cache or model.config.cache)
    return model


def formats(model: Any) -> dict[str, Format]:
    """The format of everything quantized in a model, stacked or not, by its path with the layer's number."""
    found: dict[str, Format] = {}

    def look(path: str, module: Any) -> None:
        if isinstance(module, Quantized):
            depth = module.lead[0] if module.lead else 1
            found.update({path.replace("/layers/", f"/layers/{i}/") if module.lead else path: module.format for i in range(depth)})

    swap(model, look)
    return found
