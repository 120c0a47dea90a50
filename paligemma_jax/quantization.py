"""Weights in 8 or 4 bits, by wrapping: a `Quantized` stands in the place of an `Einsum`, is read by the same call, and does not learn.

nf4 is that of QLoRA (arXiv:2305.14314) and bitsandbytes: blocks of 64 weights in the order of memory, each divided by its largest magnitude and
rounded to the nearest of 16 values; two of them to the byte, the first in the high bits. int8 has one scale for each output.
Codes and scales keep the kernel's axes where blocks divide the last one, so that they can be spread over devices as it is.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from paligemma_jax.model.layers import Einsum, biased, product, swap

KINDS = ("nf4", "int8")
BLOCK = 64
PROJECTIONS = r"decoder/layers/.*(attention|mlp)/\w+"  # the default: most of the model's weights

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact 0 (bitsandbytes `get_4bit_type`).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
BETWEEN = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)


class Quantized(nnx.Module):
    """An `Einsum` whose kernel is codes and scales; `shape`, `contracted` and `bias` are as there, and a stack's leading axes too."""

    def __init__(self, kind: str, shape: tuple[int, ...], contracted: int, codes: Array, scale: Array, bias: Any):
        self.kind, self.shape, self.contracted = kind, shape, contracted
        self.codes, self.scale, self.bias = nnx.Param(codes), nnx.Param(scale), bias

    @property
    def lead(self) -> tuple[int, ...]:
        """A stack's leading axes."""
        return self.codes.shape[: self.codes.ndim - _axes(self.kind, self.shape)]

    def dense(self, dtype: Any) -> Array:
        return dequantize(self.kind, self.codes[...], self.scale[...], self.shape).astype(dtype)

    def __call__(self, x: Array) -> Array:
        def multiply(x: Array, codes: Array, scale: Array) -> Array:
            return product(x, dequantize(self.kind, codes, scale, self.shape).astype(x.dtype), self.contracted)

        # Checkpointed: or else the backward pass would hold the whole kernel of every layer.
        return biased(jax.checkpoint(multiply)(x, self.codes[...], self.scale[...]), self.bias)


@partial(jax.jit, static_argnums=(0, 2))
def quantize_array(kind: str, kernel: Array, contracted: int) -> tuple[Array, Array]:
    """kernel [out..., in...] -> codes and float32 scales.

    int8: int8 [out..., in...] and [out...]. nf4: uint8 [..., X/2] and [..., X/64] of [..., X], or flat where 64 does not divide X.
    """
    wide = kernel.astype(jnp.float32)
    if kind == "int8":
        ins = tuple(range(kernel.ndim - contracted, kernel.ndim))
        scale = jnp.max(jnp.abs(wide), axis=ins) / 127
        return jnp.round(wide / jnp.maximum(jnp.expand_dims(scale, ins), 1e-30)).astype(jnp.int8), scale
    blocks = wide.reshape(-1, BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=1)
    part = blocks / jnp.maximum(scale, 1e-30)[:, None]
    codes = sum((part > edge).astype(jnp.uint8) for edge in BETWEEN).reshape(-1, 2)  # type: ignore[union-attr]
    axes = kernel.shape[: _axes(kind, kernel.shape) - 1]
    return (codes[:, 0] << 4 | codes[:, 1]).reshape(*axes, -1), scale.reshape(*axes, -1)


def _axes(kind: str, shape: tuple[int, ...]) -> int:
    """How many axes the codes of a kernel have."""
    return 1 if kind == "nf4" and shape[-1] % BLOCK else len(shape)


def dequantize(kind: str, codes: Array, scale: Array, shape: tuple[int, ...]) -> Array:
    """float32 [*lead, *shape] of what `quantize_array` made."""
    if kind == "int8":
        return codes * scale.reshape(*scale.shape, *[1] * (codes.ndim - scale.ndim))
    values = jnp.asarray(NF4)[jnp.stack([codes >> 4, codes & 15], axis=-1)]
    values = values.reshape(*scale.shape, BLOCK) * scale[..., None]
    return values.reshape(*codes.shape[: codes.ndim - _axes(kind, shape)], *shape)


def parts(small: Any, path: str, kernel: Array) -> dict[str, Array]:
    """What a model that `quantize` made of shapes holds in the place of the parameter at `path`."""
    at: Any = small
    for name in path.removesuffix("/kernel").split("/"):
        at = at[int(name)] if name.isdigit() else getattr(at, name)
    if not isinstance(at, Quantized) or not path.endswith("/kernel"):
        return {path: kernel}
    codes, scale = quantize_array(at.kind, kernel, at.contracted)
    where = path.removesuffix("kernel")
    return {where + "codes": codes, where + "scale": scale}


def quantize(model: Any, kind: str, pattern: str = PROJECTIONS) -> Any:
    """The model with every `Einsum` whose path matches `pattern` quantized. A kernel that blocks of 64 do not divide stays as it is."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantization {kind!r}; there are {', '.join(KINDS)}")

    def make(path: str, module: Any) -> Quantized | None:
        if not isinstance(module, Einsum) or not re.fullmatch(pattern, path) or (kind == "nf4" and math.prod(module.shape) % BLOCK):
            return None
        kernel = module.kernel[...]
        lead = kernel.ndim - len(module.shape)
        of = lambda kernel: quantize_array(kind, kernel, module.contracted)
        for _ in range(lead):
            of = jax.vmap(of)
        codes, scale = of(kernel)
        return Quantized(kind, module.shape, module.contracted, codes, scale, module.bias)

    return swap(model, make)
