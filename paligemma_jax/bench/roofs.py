"""What the machine reaches at best: the rates that measurements are held against."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from paligemma_jax.bench.clock import Record, Run
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.quantization.quantize import weight_formats
from paligemma_jax.sharding.devices import matrix_rate, read_rate

ROOFS = "roofs"  # the contender that only multiplies and reads


def product_dtype(model: PaliGemma) -> str:
    """Return the dtype of the fastest products of a model: int8 if any are of 8-bit integers."""
    kinds = {format.kind for format in weight_formats(model).values()}
    return "int8" if "w8a8" in kinds else model.config.dtype


def roofs(dtype: str | None = None, nbytes: int = 0) -> Run:
    """Return a contender that only multiplies and reads.

    Its times are the seconds of one FLOP in a large matrix product, and of reading one byte of an
    array; 0 without `dtype`, or without `nbytes`.

    Args:
        dtype: Dtype of the products. On a CPU, floating-point products of all dtypes are computed
            in float32, and those of integers are not faster.
        nbytes: What a step of decoding reads. A model that fits into a cache is held against the
            cache.
    """
    computed = "float32" if jax.default_backend() == "cpu" else dtype

    def run() -> tuple[float, float]:
        multiply = 1 / matrix_rate(computed) if dtype and computed else 0.0
        return multiply, 1 / read_rate(nbytes) if nbytes else 0.0

    return run


def add_shares(rows: Sequence[Record]) -> None:
    """Add the shares of the roofs to measured rows.

    A roof is the best that any row measured: the matrix rate is the same for all of a dtype, and
    what reading an array reaches, reading a smaller one reaches too. So a disturbance lowers no
    roof for long.
    """
    multiply = [row for row in rows if "flops_s" in row]
    for row in multiply:
        row["matrix_flops_s"] = max(
            other["matrix_flops_s"]
            for other in multiply
            if other["matrix_dtype"] == row["matrix_dtype"]
        )
        row["matrix_share"] = row["flops_s"] / row["matrix_flops_s"]
    read = [row for row in rows if "bytes_s" in row]
    for row in read:
        row["read_bytes_s"] = max(
            other["read_bytes_s"] for other in read if other["step_bytes"] >= row["step_bytes"]
        )
        row["bandwidth_share"] = row["bytes_s"] / row["read_bytes_s"]
