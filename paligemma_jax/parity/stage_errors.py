"""The errors of every stage against the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.inference import scoring
from paligemma_jax.losses.tokens import cross_entropy
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.parity import torch_model
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.compare import (
    ACCUMULATED_LIMIT,
    GRADIENT_LIMIT,
    LOSS_LIMIT,
    StageError,
    describe_shapes,
    error_limits,
    measure_error,
    without_padding,
)
from paligemma_jax.parity.reference import Reference, Stages


def stage_errors(
    case: ParityCase,
    stages: Stages,
    local: Stages,
    reference: Reference,
    by_ratio: bool = False,
    float64: Stages | None = None,
) -> Iterator[StageError]:
    """Yield the errors of every stage and of the loss.

    Args:
        stages: Our stages, computed from the inputs on.
        local: Our stages, each computed from transformers' stages.
        reference: transformers' stages.
        by_ratio: Compare with transformers' own errors, in bfloat16.
        float64: Our stages in float64, computed from the inputs on.
    """
    layers, layer = [name for name in stages if re.search(r"layers/\d+$", name)], 0
    for name in stages:
        layer = layers.index(name) if name in layers else layer
        values = (stages, local, reference.stages, reference.exact, reference.exact_local)
        ours, ours_local, theirs, exact, exact_local = (
            without_padding(name, arrays[name], case.inputs) for arrays in values
        )
        baseline = (None, None)
        if by_ratio:
            baseline = (measure_error(theirs, exact), measure_error(theirs, exact_local))
        row = StageError(
            name,
            measure_error(ours, exact),
            measure_error(ours_local, exact_local),
            error_limits(name, layer, by_ratio),
            baseline,
            () if ours.shape == theirs.shape else (describe_shapes(ours, theirs),),
        )
        if float64:
            row = with_float64(row, ours, theirs, without_padding(name, float64[name], case.inputs))
        yield row
    if case.inputs.targets.any():
        yield loss_error(case, stages["logits"], reference, by_ratio, float64)


def with_float64(
    row: StageError, ours: np.ndarray, theirs: np.ndarray, float64: np.ndarray
) -> StageError:
    """The row with the errors of both models against float64."""
    errors = measure_error(ours, float64), measure_error(theirs, float64)
    return replace(row, ours_from_float64=errors[0], transformers_from_float64=errors[1])


def loss_error(
    case: ParityCase,
    logits: np.ndarray,
    reference: Reference,
    by_ratio: bool,
    float64: Stages | None = None,
) -> StageError:
    """The loss of our logits (accumulated) and of transformers' logits (local).

    A loss is the mean over n targets of differences between numbers as large as the logits, so a
    small loss has few significant digits in float32, in transformers as here. (The caption loss of
    `tiny` is 1e-4, with a relative rounding error of 1e-3.) The limits allow for that.
    """
    inputs, own = case.inputs, reference.stages["logits"]

    def loss(logits: np.ndarray) -> np.ndarray:
        tokens, targets = jnp.asarray(inputs.tokens), jnp.asarray(inputs.targets)
        return np.asarray(cross_entropy(jnp.asarray(logits), tokens, targets))[None]

    exact = torch_model.compute_loss(reference.exact["logits"], inputs)
    theirs = torch_model.compute_loss(own, inputs)
    ours = loss(logits)
    errors = measure_error(ours, exact), measure_error(loss(own), theirs)
    # The ratio of two single numbers is meaningless. Instead, allow for rounding to bfloat16.
    limits = 2**-8, LOSS_LIMIT
    if not by_ratio:
        rounding = np.finfo(np.float32).eps * np.abs(own).max() / inputs.targets.sum() ** 0.5
        floor = float(rounding / np.abs(theirs[0]))
        limits = max(ACCUMULATED_LIMIT, floor), max(LOSS_LIMIT, floor)
    row = StageError("loss", *errors, limits)
    if float64:
        with jax.enable_x64(True):
            row = with_float64(row, ours, theirs, loss(float64["logits"]))
    return row


def compiled_logits_error(
    case: ParityCase,
    model: PaliGemma,
    reference: Reference,
    by_ratio: bool,
    float64: Stages | None = None,
) -> StageError:
    """The error of the logits of the complete model in one program, as `generate` compiles it, from
    the inputs made here. The stages come from one program per layer.

    Rows of different lengths are compared from the end, as far as both have tokens.
    """
    logits = np.asarray(scoring.forward(model, case.own_inputs), np.float32)
    length = min(case.own_inputs.tokens.shape[1], case.inputs.tokens.shape[1])
    valid = case.own_inputs.valid[:, -length:] & case.inputs.valid[:, -length:]

    def common(logits: np.ndarray) -> np.ndarray:
        return logits[:, -length:][valid]

    ours, theirs = common(logits), common(reference.stages["logits"])
    exact = common(reference.exact["logits"])
    config = case.checkpoint.config
    depth = config.vision.num_hidden_layers + config.decoder.num_hidden_layers
    limit, _ = error_limits("logits", depth, by_ratio)
    baseline = measure_error(theirs, exact) if by_ratio else None
    error = measure_error(ours, exact)
    row = StageError("logits, one program", error, None, (limit, 0.0), (baseline, None))
    return with_float64(row, ours, theirs, common(float64["logits"])) if float64 else row


def gradient_errors(
    ours: Stages, theirs: Stages, float64: Stages | None = None
) -> Iterator[StageError]:
    """The worst gradient of each layer and of each module outside the layers, in the order of the
    backward pass."""
    groups: dict[str, list[StageError]] = {}
    for path in ours:
        if path.endswith("attention/k/bias"):
            continue  # zero except for rounding: softmax ignores what all keys have in common
        error = measure_error(ours[path], theirs[path])
        row = StageError(f"gradient, {path}", error, None, (GRADIENT_LIMIT, 0.0))
        if float64:
            row = with_float64(row, ours[path], theirs[path], float64[path])
        layer = re.match(r"\w+/layers/\d+", path)
        groups.setdefault(layer[0] if layer else path.split("/")[0], []).append(row)
    for rows in reversed(groups.values()):
        yield max(rows, key=lambda row: row.accumulated.relative)
