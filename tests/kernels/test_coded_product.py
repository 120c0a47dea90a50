"""Products with codes on TPUs, interpreted on a CPU: as exact as the plain form, by float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from paligemma_jax.kernels import code_reader, coded_product, many_rows
from paligemma_jax.model import codes
from paligemma_jax.model.precision import WeightFormat

# One row of x and several; ragged and whole blocks of rows, outputs and columns, among them widths
# of `tiny` (64, 96), SigLIP (1152) and Gemma (2304).
CASES = [
    # format, M, O, I
    ("nf4", 3, 72, 1152),
    ("nf4-32", 300, 130, 192),
    ("fp4", 1, 64, 64),
    ("int4", 17, 96, 2304),
    ("int8", 300, 130, 96),
]
MORE_CASES = [
    ("nf4", 300, 130, 192),
    ("nf4-32", 8, 512, 256),
    ("nf4-128", 33, 640, 512),
    ("fp4", 20, 200, 9216),
    ("int4-128", 64, 257, 2048),
    ("int8", 5, 200, 4304),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Interpret kernels, without caching that they were."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    for name in ("multiply_few_rows", "multiply_many_rows"):
        monkeypatch.setattr(coded_product, name, getattr(coded_product, name).__wrapped__)


@pytest.fixture
def one_gather(monkeypatch):
    """Gather from all registers at once: XLA on a CPU needs seconds to compile hundreds of them."""

    def gather(values, index, axis):
        registers = (-1, code_reader.SUBLANES, code_reader.LANES)
        values = jnp.broadcast_to(values.reshape(registers), index.reshape(registers).shape)
        gathered = jnp.take_along_axis(values, index.reshape(registers), axis + 1)
        return gathered.reshape(index.shape)

    monkeypatch.setattr(code_reader, "gather", gather)
    monkeypatch.setattr(many_rows, "gather", gather)


def check(format: str, M: int, O: int, I: int, dtype: str) -> None:
    """Compare results and gradients of both forms with float64."""
    parsed = WeightFormat.parse(format)
    rng = np.random.default_rng(M)
    parts = codes.encode(parsed, jnp.asarray(rng.normal(size=(O, I)), jnp.float32), 1)
    x = jnp.asarray(rng.normal(size=(M, I)), dtype)
    y_bar = jnp.asarray(rng.normal(size=(M, O)), dtype).astype(jnp.float32)
    dense = np.asarray(codes.decode(parsed, parts, (O, I)), np.float64)

    def errors(product) -> list[float]:
        scale = codes.scales(parts)
        y, pull_back = jax.vjp(lambda x: product(x, parts["codes"], scale), x)
        exact = (np.asarray(x, np.float64) @ dense.T, np.asarray(y_bar, np.float64) @ dense)
        return [
            float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
            for a, b in zip((y, *pull_back(y_bar)), exact, strict=True)
        ]

    kernel = errors(partial(codes._on_chip, parsed, jnp.float32))
    plain = errors(partial(codes._at_once, parsed))
    bounds = (0, 2**-8) if dtype == "bfloat16" else (1e-5, 1e-5)  # the kernel rounds y_bar
    for error, plain_error, bound in zip(kernel, plain, bounds, strict=True):
        assert error <= max(1.1 * plain_error, bound), (kernel, plain)


@pytest.mark.parametrize(
    "format, M, O, I",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
@pytest.mark.thorough
def test_as_exact_as_the_plain_form(one_gather, format, M, O, I):
    check(format, M, O, I, "bfloat16")


@pytest.mark.parametrize("format", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_float32_is_multiplied_at_the_highest_precision(one_gather, format):
    check(format, 5, 136, 192, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("M", [2, 70])
def test_registers_are_gathered_one_by_one(M):
    check("nf4", M, 128, 256, "bfloat16")
