"""Products of `model/layers.py` as they are compiled for each platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.model.layers import _multiply_as_two_rows, matrix_product


@pytest.mark.parametrize("platform, rows", [("tpu", 2), ("cpu", 1), ("cuda", 1)])
def test_rows_of_a_one_row_product(platform: str, rows: int):
    x, matrix = jax.ShapeDtypeStruct((1, 1, 24), jnp.bfloat16), jnp.ones((40, 24), jnp.bfloat16)
    lowered = jax.jit(matrix_product).trace(x, matrix).lower(lowering_platforms=(platform,))
    (product,) = (line for line in lowered.as_text().splitlines() if "dot_general" in line)
    assert ("tensor<2x24x" in product) == (rows == 2), product


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
def test_a_row_as_two_rows(shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    x, matrix = (rng.normal(size=size).astype(np.float32) for size in (shape, (40, 24)))
    y = _multiply_as_two_rows(jnp.asarray(x), jnp.asarray(matrix), jnp.float32)
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-5, atol=1e-5)
    assert matrix_product(jnp.asarray(x), jnp.asarray(matrix)).shape == y.shape
