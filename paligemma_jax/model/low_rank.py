"""Products with a weight and the two narrow matrices that LoRA puts beside it.

Where the result is wide, the weight and the narrow matrix are one product: apart, the narrow one is
one more pass through a wide array in memory. On a TPU v5e the forward pass of an MLP of 3b with
rank 16 then takes 1 % longer than without LoRA, instead of 24 %. On a CPU they are apart all the
same, since copying the weight costs more there.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paligemma_jax.model.layers import matrix_product


def adapted_product(
    x: Float[Array, "... I"],
    weight: Float[Array, "O I"],
    a: Float[Array, "R I"],
    b: Float[Array, "O R"],
    scale: float,
    wide: str,
) -> Float[Array, "... O"]:
    """Compute x @ weight.T + scale * x @ a.T @ b.T.

    Args:
        wide: The side of the weight that is wide: "outputs" or "inputs", where the gradient is
            the wide result.
    """
    if wide == "outputs":
        return widen(x, matrix_product(x, a), weight, b, scale)
    y, low = narrow(x, weight.T, a.T, 1.0)  # type: ignore[misc]
    return y + scale * matrix_product(low, b)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def widen(
    x: Float[Array, "... D"],
    low: Float[Array, "... R"],
    weight: Float[Array, "F D"],
    b: Float[Array, "F R"],
    scale: float,
) -> Float[Array, "... F"]:
    """Compute x @ weight.T + scale * low @ b.T."""
    if math.prod(x.shape[:-1]) <= x.shape[-1]:  # decoding: the weight is larger than the result
        return apart(x, low, weight, b, scale)
    forms = {"cpu": apart, "default": together}
    forms = {platform: partial(form, scale=scale) for platform, form in forms.items()}
    return jax.lax.platform_dependent(x, low, weight, b, **forms)


def together(x: Array, low: Array, weight: Array, b: Array, scale: float) -> Array:
    weights = jnp.concatenate([weight, scale * b], axis=1)
    return matrix_product(jnp.concatenate([x, low], axis=-1), weights)


def apart(x: Array, low: Array, weight: Array, b: Array, scale: float) -> Array:
    return matrix_product(x, weight) + scale * matrix_product(low, b)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def narrow(
    y: Float[Array, "... F"], weight: Float[Array, "F D"], b: Float[Array, "F R"], scale: float
) -> tuple[Float[Array, "... D"], Float[Array, "... R"]]:
    """Compute y @ weight and scale * y @ b, the transpose of `widen`."""
    return y @ weight, (scale * y) @ b


def _widen_forward(x, low, weight, b, scale):
    return widen(x, low, weight, b, scale), (x, low, weight, b)


def _widen_backward(scale, residuals, g):
    x, low, weight, b = residuals
    dx, dlow = narrow(g, weight, b, scale)  # type: ignore[misc]
    return dx, dlow, _outer(g, x), _outer(scale * g, low)


def _narrow_forward(y, weight, b, scale):
    return narrow(y, weight, b, scale), (y, weight, b)


def _narrow_backward(scale, residuals, gradients):
    y, weight, b = residuals
    x, low = gradients
    return widen(x, low, weight, b, scale), _outer(y, x), _outer(scale * y, low)


widen.defvjp(_widen_forward, _widen_backward)
narrow.defvjp(_narrow_forward, _narrow_backward)


def _outer(y: Array, x: Array) -> Array:
    return jnp.einsum("...o,...i->oi", y, x)
