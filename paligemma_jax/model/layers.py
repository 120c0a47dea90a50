"""Layers that both towers share: linear layers, norms, rotary positions."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import AbstractDtype, Float, Int

from paligemma_jax.model.constrain import gather_weight

# Axis letters, used in every einsum, comment, weight table and sharding rule:
#   B batch   T query tokens   S key tokens (cache slots)   D decoder width    V vocabulary
#   N heads   K key/value heads   G = N/K   H head size     F MLP width        L layers
#   M images  P patches        U = patch*patch*3 pixels     W vision width   X = K*H
#   Z part of the vocabulary, in the loss

if TYPE_CHECKING:
    from jaxtyping import Float as FullFloat
else:

    class FullFloat(AbstractDtype):
        """A dtype that `full_dtype` returns."""

        dtypes = ["float32", "float64"]


def full_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, RoPE, scores, softmax and logits for activations of `dtype`: float32, or
    float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def available_dtype(dtype: str) -> str:
    """Return `dtype`, if JAX computes in it.

    Raises:
        ValueError: It is float64 without 64-bit mode, where JAX would compute in float32.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"dtype {dtype} needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
    return dtype


class Linear(nnx.Module):
    """x [..., in...] -> x @ kernel + bias [..., out...] in x's dtype.

    Every matrix product of the model is a `Linear`, so LoRA and quantization replace one class. The
    kernel is [out..., in...], as in torch: on a CPU the product then runs at the speed of memory
    (with [in..., out...], at 0.65 to 0.9 of it; on GPUs and TPUs the layout does not matter).

    Args:
        axes: Letters of the kernel's axes, outputs first, as in "NHD".
        shape: Sizes of these axes.
        contracted: Number of trailing axes to sum over.
        bias: Whether to add a bias [out...].

    Weights are drawn from N(0, 1/fan_in).
    """

    def __init__(
        self,
        axes: str,
        shape: tuple[int, ...],
        *,
        contracted: int = 1,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.axes, self.shape, self.contracted = axes, shape, contracted
        std = math.prod(self.shape[-contracted:]) ** -0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * std)
        self.bias = nnx.Param(jnp.zeros(shape[:-contracted])) if bias else None

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of a stack of layers."""
        return self.kernel.shape[: self.kernel.ndim - len(self.shape)]

    def dense(self, dtype: DTypeLike) -> Array:
        """The kernel [*lead, out..., in...] in `dtype`."""
        return self.kernel[...].astype(dtype)

    def __call__(self, x: Float[Array, "... _"]) -> Array:
        kernel = gather_weight(self.axes, self.dense(x.dtype))
        if self.bias is None:
            return product(x, kernel, self.contracted)
        # Rounded once, after the bias is added, as torch's addmm rounds.
        y = product(x, kernel, self.contracted, full_dtype(x.dtype))
        return add_bias(y, self.bias).astype(x.dtype)


def product(x: Array, kernel: Array, contracted: int, dtype: DTypeLike | None = None) -> Array:
    """x [..., in...] times kernel [out..., in...] over the last `contracted` axes -> [..., out...].

    The result has `dtype`, by default x's. Computed as one matrix [out, in]: with more axes XLA on
    a CPU transposes and copies the kernel for each product.
    """
    outs = kernel.shape[: kernel.ndim - contracted]
    x = x.reshape(*x.shape[: x.ndim - contracted], -1)
    kernel = kernel.reshape(math.prod(outs), -1)
    y = matrix_product(x, kernel, dtype)
    return y.reshape(*y.shape[:-1], *outs)


def matrix_product(x: Array, matrix: Array, dtype: DTypeLike | None = None) -> Array:
    """x [..., I] times matrix [O, I] -> [..., O] in `dtype`, by default x's.

    On a TPU a single row is multiplied as two: the compiler gives one row to the vector unit and
    two to the matrix unit, which needs 0.37 of the cycles for the vocabulary, 0.06 for the MLP.
    """
    multiply = partial(_multiply, dtype=dtype)
    if math.prod(x.shape[:-1]) != 1:
        return multiply(x, matrix)
    as_two = partial(_multiply_as_two_rows, dtype=dtype)
    return jax.lax.platform_dependent(x, matrix, tpu=as_two, default=multiply)


def _multiply(x: Array, matrix: Array, dtype: DTypeLike | None) -> Array:
    return jnp.einsum("...i,oi->...o", x, matrix, preferred_element_type=dtype)


def _multiply_as_two_rows(x: Array, matrix: Array, dtype: DTypeLike | None) -> Array:
    row_and_zeros = jnp.pad(x.reshape(1, -1), [(0, 1), (0, 0)])
    return _multiply(row_and_zeros, matrix, dtype)[0].reshape(*x.shape[:-1], -1)


def add_bias(y: Array, bias: nnx.Param | None) -> Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def identity(x: Array) -> Array:
    return x


class RMSNorm(nnx.Module):
    """Gemma's norm: x / rms(x) * (1 + scale), in `full_dtype` with one cast at the end
    (transformers `Gemma2RMSNorm`)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(full_dtype(x.dtype))
        y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
        return (y * (1 + self.scale[...].astype(y.dtype))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """SigLIP's norm, with the biased variance; statistics in `full_dtype`."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        y = x.astype(full_dtype(x.dtype))
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(y.dtype), self.bias[...].astype(y.dtype)
        return (y * scale + bias).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotate the halves of each head by its token's position, in `full_dtype`.

    Inverse frequencies are rounded as transformers rounds them. big_vision divides by the timescale
    instead; XLA compiles both to the same product.
    """
    dtype = full_dtype(x.dtype)
    one, size = dtype.type(1), dtype.type(x.shape[-1])
    exponent = np.arange(0, x.shape[-1], 2, dtype=dtype) / size
    # Correctly rounded, as torch's pow nearly always is and numpy's float32 pow is not.
    timescale = (theta ** exponent.astype(np.float64)).astype(dtype)
    angle = positions[..., None, None].astype(dtype) * (one / timescale)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)


def place_prefix(
    prefix: Float[Array, "2 P K H"],
    index: Int[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Put the keys and values of a prefix in place of those of the first P tokens of each row."""
    is_prefix = ((index >= 0) & (index < prefix.shape[1]))[..., None, None]
    placed = prefix.astype(k.dtype)[:, jnp.clip(index, 0, prefix.shape[1] - 1)]
    return jnp.where(is_prefix, placed[0], k), jnp.where(is_prefix, placed[1], v)
