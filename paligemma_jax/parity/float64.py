"""This model in float64, which tells whose error a difference is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import with_parameters
from paligemma_jax.parity import end_to_end, jax_model
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.reference import Stages


def float64_stages(case: ParityCase, attention: bool) -> Stages:
    """Every stage in float64, from the same weights and inputs.

    Args:
        attention: Compute attention weights too.
    """
    with _float64_model(case) as (model, read):
        return jax_model.compute_stages(model, read, case.inputs, attention)


def float64_gradients(case: ParityCase) -> Stages:
    """Every gradient in float64."""
    with _float64_model(case) as (model, read):
        return end_to_end.compute_gradients(with_parameters(model, read), case)


@contextmanager
def _float64_model(case: ParityCase) -> Iterator[tuple[PaliGemma, jax_model.ReadParameter]]:
    """`jax_model.build_model` in float64. Inside, JAX computes in 64 bits, and on a CPU.

    Raises:
        ValueError: JAX is configured to use no CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise ValueError(
            "--float64 computes on the CPU: add it to JAX_PLATFORMS, as in cuda,cpu"
        ) from None
    config = replace(case.checkpoint.config, attention="plain")
    with jax.enable_x64(True), jax.default_device(cpu):
        yield jax_model.build_model(replace(case.checkpoint, config=config), "float64")
