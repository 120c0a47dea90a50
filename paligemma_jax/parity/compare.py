"""Errors of a value against its reference, and their limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from paligemma_jax.processing.processor import Inputs

BLOCK = 2**20  # elements at a time in float64
# Relative errors in float32 that one stage may add. Measured errors are 1e-6, and 5e-6 for
# attention weights, whose exponents reach 50.
LOCAL_LIMIT, WEIGHTS_LIMIT = 4e-6, 2e-5
ACCUMULATED_LIMIT = 1e-5  # times the square root of the number of layers so far
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
RATIO_LIMIT = 1.3  # in bfloat16: ours over transformers' own error against float32


@dataclass(frozen=True)
class Error:
    """The distance of a value from its reference.

    `relative` is the norm of the difference over the norm of the reference. `cosine` is 1 - the
    cosine of the angle between the two, about half the square of `relative`.
    """

    max: float
    mean: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class StageError:
    """The errors of one stage: accumulated since the inputs, and local (computed from
    transformers' input to the stage).

    In bfloat16 both are measured against float32, and the limits apply to their ratio to
    `baseline`, transformers' own errors in bfloat16.
    """

    stage: str
    accumulated: Error
    local: Error | None
    limits: tuple[float, float]  # of the checked values: accumulated, local
    baseline: tuple[Error | None, Error | None] = (None, None)  # accumulated, local
    details: tuple[str, ...] = ()  # what differs, where numbers alone do not tell
    # Accumulated errors of both models against this model in float64, if that was computed.
    ours_from_float64: Error | None = None
    transformers_from_float64: Error | None = None

    @property
    def float64_ratio(self) -> float | None:
        """Our distance from float64 over transformers' own."""
        if self.ours_from_float64 is None:
            return None
        return _checked(self.ours_from_float64, self.transformers_from_float64)

    @property
    def checked(self) -> tuple[float, float]:
        """The values that the limits apply to: relative errors, or in bfloat16 their ratios to the
        baseline."""
        return _checked(self.accumulated, self.baseline[0]), _checked(self.local, self.baseline[1])

    @property
    def diverges(self) -> bool:
        """Whether the local error is too large; without one, whether the accumulated error is."""
        return not self.checked[1] <= self.limits[1] if self.local else self.over_limit

    @property
    def over_limit(self) -> bool:
        """Whether the accumulated error is too large."""
        return not self.checked[0] <= self.limits[0]

    def as_dict(self) -> dict:
        flags = {"diverges": self.diverges, "over_limit": self.over_limit}
        return asdict(self) | {"checked": self.checked} | flags


def _checked(error: Error | None, baseline: Error | None) -> float:
    if error is None:
        return 0.0
    if baseline is None:
        return error.relative
    if baseline.relative:
        return error.relative / baseline.relative
    return math.inf if error.relative else 1.0


def measure_error(value: np.ndarray, reference: np.ndarray) -> Error:
    """Measure in float64, block by block. If only one side is NaN or infinite, all are NaN. If the
    shapes differ, all are infinite."""
    if value.shape != reference.shape:
        return Error(math.inf, math.inf, math.inf, math.inf)
    value, reference = value.reshape(-1), reference.reshape(-1)
    largest, total, difference_square = 0.0, 0.0, 0.0
    value_square, reference_square, product = 0.0, 0.0, 0.0
    for start in range(0, len(value), BLOCK):
        x = value[start : start + BLOCK].astype(np.float64)
        y = reference[start : start + BLOCK].astype(np.float64)
        difference = np.abs(x - y)
        largest = np.maximum(largest, difference.max())
        total += difference.sum()
        difference_square += difference @ difference
        value_square, reference_square = value_square + x @ x, reference_square + y @ y
        product += x @ y
    if value_square and reference_square:
        cosine = 1 - product / np.sqrt(value_square * reference_square)
    else:
        cosine = float(value_square != reference_square)
    if reference_square:
        relative = np.sqrt(difference_square / reference_square)
    else:
        relative = math.inf if difference_square else 0.0
    mean = total / max(1, len(value))
    cosine = float(np.maximum(0.0, cosine))  # NaN stays NaN
    return Error(float(largest), float(mean), float(relative), cosine)


def describe_shapes(ours: np.ndarray, theirs: np.ndarray) -> str:
    """State that two shapes differ."""
    return f"the shape is {list(ours.shape)} here and {list(theirs.shape)} in transformers"


def without_padding(stage: str, value: np.ndarray, inputs: Inputs) -> np.ndarray:
    """A stage's values [n, ...] at valid tokens; values at pads have no effect."""
    if not stage.startswith(("decoder", "logits")):
        return value
    valid = inputs.valid[:, None] if stage.endswith("weights") else inputs.valid
    return value[np.broadcast_to(valid, value.shape[:-1])]


def error_limits(stage: str, layers: int, by_ratio: bool) -> tuple[float, float]:
    """The limits (accumulated, local) of a stage after `layers` layers."""
    if by_ratio:
        return RATIO_LIMIT, RATIO_LIMIT
    local = WEIGHTS_LIMIT if stage.endswith("weights") else LOCAL_LIMIT
    return ACCUMULATED_LIMIT * (1 + layers) ** 0.5, local
