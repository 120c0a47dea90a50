"""The forms of a product with low-rank matrices beside the weight compute the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.model import low_rank

O, I, R, SCALE = 12, 20, 3, 0.3


def plain(x, weight, a, b):
    return x @ weight.T + SCALE * (x @ a.T @ b.T)


@pytest.mark.parametrize("wide", ["outputs", "inputs"])
@pytest.mark.parametrize("form", [low_rank.together, low_rank.apart])
def test_values_and_gradients(wide, form, monkeypatch):
    """Of all arguments: besides LoRA, the weight itself may be trained."""
    monkeypatch.setattr(low_rank, "apart", form)  # the form that a CPU uses
    shapes = [(2, 15, I), (O, I), (R, I), (O, R)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arguments = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def adapted(x, weight, a, b):
        return low_rank.adapted_product(x, weight, a, b, SCALE, wide)

    def value_and_gradients(function):
        def loss(*arguments):
            return jnp.sum(jnp.sin(function(*arguments)))

        return function(*arguments), *jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)

    pairs = zip(value_and_gradients(adapted), value_and_gradients(plain), strict=True)
    for result, expected in pairs:
        np.testing.assert_allclose(result, expected, atol=1e-4)
