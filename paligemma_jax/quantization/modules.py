"""Modules with weights in 8 or 4 bits, called like the modules they replace, but not trainable.

The arithmetic is in `model/codes.py`, the formats and their names in `model/precision.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from paligemma_jax.model.codes import decode, encode, multiply, scales
from paligemma_jax.model.constrain import constrain
from paligemma_jax.model.decoder import Embedder, split_rows
from paligemma_jax.model.layers import Linear, add_bias, product
from paligemma_jax.model.precision import WeightFormat
from paligemma_jax.model.tree import Model, copy_tree, replace_modules
from paligemma_jax.quantization.w8a8 import multiply_rounded


class QuantizedLinear(nnx.Module):
    """A `Linear` whose kernel is stored as codes and scales (`model/codes.py`).

    `axes`, `shape`, `contracted`, `bias` and `lead` are those of the `Linear`.
    """

    def __init__(
        self,
        format: WeightFormat,
        axes: str,
        shape: tuple[int, ...],
        contracted: int,
        parts: Mapping[str, Array],
        bias: nnx.Param | None = None,
    ):
        self.format, self.axes, self.shape = format, axes, shape
        self.contracted, self.bias = contracted, bias
        self.codes, self.scale = nnx.Param(parts["codes"]), nnx.Param(parts["scale"])
        self.nested = nnx.Param(parts["nested"]) if "nested" in parts else None

    @property
    def parts(self) -> dict[str, Array]:
        parts = {"codes": self.codes, "scale": self.scale, "nested": self.nested}
        return {name: param[...] for name, param in parts.items() if param is not None}

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of a stack of layers."""
        return self.codes.shape[: self.codes.ndim - len(self.shape)]

    def dense(self, dtype: DTypeLike) -> Array:
        """The kernel [*lead, out..., in...] in `dtype`."""
        return decode(self.format, self.parts, self.shape).astype(dtype)

    def __call__(self, x: Array) -> Array:
        outs, ins = self.shape[: -self.contracted], self.shape[-self.contracted :]
        # Checkpointed: otherwise the backward pass would keep every layer's widened kernel.
        if self.format.has_blocks and math.prod(ins) % self.format.block:

            @jax.checkpoint
            def widen_and_multiply(x: Array) -> Array:  # blocks span the ends of rows
                return product(x, self.dense(x.dtype), self.contracted, jnp.float32)

            return add_bias(widen_and_multiply(x), self.bias).astype(x.dtype)
        flat = x.reshape(*x.shape[: x.ndim - len(ins)], -1)
        # Rounded once, as in `Linear`: after the bias is added.
        multiply = partial(self.multiply, dtype=x.dtype if self.bias is None else jnp.float32)
        y = jax.checkpoint(multiply)(flat, self.codes[...], scales(self.parts))
        y = y.reshape(*y.shape[:-1], *outs)
        return add_bias(y, self.bias).astype(x.dtype)

    def multiply(
        self, x: Array, codes: Array, scale: Array, dtype: DTypeLike = jnp.float32
    ) -> Array:
        """x [..., I] times codes [out..., in...] (or some of their rows) and their float32 scales
        -> [..., O] in `dtype`.

        Parts that are split along D or W are gathered first, so that devices of a fully sharded
        model exchange codes instead of widened weights.
        """
        axes = " ".join(self.axes.replace("D", "-").replace("W", "-"))
        codes, scale = constrain(axes, codes), constrain(axes, scale)
        rows = math.prod(codes.shape[: -self.contracted])
        per_row = (-1,) if self.format.has_blocks else ()
        codes, scale = codes.reshape(rows, -1), scale.reshape(rows, *per_row)
        if self.format.kind == "w8a8":
            return multiply_rounded(x.astype(jnp.float32), codes, scale)
        return multiply(self.format, x, codes, scale, dtype)


class QuantizedEmbedder(QuantizedLinear, Embedder):
    """An `Embedder` whose table is stored as codes and scales."""

    def rows(self, tokens: Array, dtype: DTypeLike) -> Array:
        parts = {"codes": self.codes[...][tokens], "scale": scales(self.parts)[tokens]}
        return decode(self.format, parts, (*tokens.shape, self.shape[1])).astype(dtype)

    def decode(self, x: Array) -> Array:
        return jax.checkpoint(self.multiply)(x, self.codes[...], scales(self.parts))

    def split(self, parts: int, dtype: DTypeLike) -> QuantizedEmbedder:
        part = copy_tree(self)
        part.axes, part.nested = "ZD", None
        part.codes = nnx.Param(split_rows(self.codes[...], parts))
        part.scale = nnx.Param(split_rows(scales(self.parts), parts))
        return part


def quantize_modules(
    model: Model,
    formats: Mapping[str, WeightFormat],
    parts: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
) -> Model:
    """The model with the modules at the paths of `formats` quantized. Works on stacked layers, and
    on shapes inside `jax.eval_shape`.

    Args:
        parts: The parts of matrices that are quantized already, by path. Others are rounded.
    """

    def make(path: str, module: nnx.Module) -> nnx.Module | None:
        format = formats.get(path)
        if format is None:
            return None
        if isinstance(module, Embedder):
            encoded = encode(format, module.table[...], 1)
            return QuantizedEmbedder(format, module.axes, module.shape, 1, encoded)
        assert isinstance(module, Linear)

        def encode_kernel(kernel: Array) -> dict[str, Array]:
            return encode(format, kernel, module.contracted)

        encoded = parts.get(path)
        if encoded is None:
            encode_all = jax.vmap(encode_kernel) if module.lead else encode_kernel
            encoded = encode_all(module.kernel[...])
        return QuantizedLinear(
            format, module.axes, module.shape, module.contracted, encoded, module.bias
        )

    return replace_modules(model, make)
