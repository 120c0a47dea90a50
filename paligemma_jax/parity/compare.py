"""How far apart two arrays are, and when that is too far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from paligemma_jax.processing.processor import Inputs

BLOCK = 2**20  # numbers at a time, in float64
# float32, of the norm: what one stage adds on the same input; measured are 1e-6, and 5e-6 of softmax weights, whose exponents reach 50.
LOCAL, WEIGHTS = 4e-6, 2e-5
GROWTH = 1e-5  # what has come together from the first stage on, times the root of the number of layers gone through
LOSS, GRADIENT = 1e-5, 1e-4
NARROW = 1.3  # bfloat16: times the error that transformers itself makes against float32


@dataclass(frozen=True)
class Error:
    """Of `found` against `wanted`. relative: norm of the difference over norm of what is wanted; cosine: 1 - cos, which is about half its square."""

    max: float
    mean: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class StageError:
    """One stage. `accumulated`: of all that came before it; `local`: on the input that transformers has there.

    In bfloat16 both are against float32, beside them stands what transformers' own bfloat16 makes of the same, and what is judged is
    the ratio of the two relative errors.
    """

    stage: str
    accumulated: Error
    local: Error | None
    limits: tuple[float, float]  # of what is judged of the two
    own: tuple[Error | None, Error | None] = (None, None)  # transformers' accumulated and local one

    @property
    def judged(self) -> tuple[float, float]:
        """Accumulated and local: relative errors, or in bfloat16 their ratios to transformers' own."""
        return _judged(self.accumulated, self.own[0]), _judged(self.local, self.own[1])

    @property
    def diverges(self) -> bool:
        """Does an error begin here? Without a local one, is there any?"""
        return not self.judged[1] <= self.limits[1] if self.local else self.beyond

    @property
    def beyond(self) -> bool:
        """Is what has come together too much?"""
        return not self.judged[0] <= self.limits[0]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"judged": self.judged, "diverges": self.diverges, "beyond": self.beyond}


def _judged(error: Error | None, own: Error | None) -> float:
    if error is None:
        return 0.0
    if own is None:
        return error.relative
    return error.relative / own.relative if own.relative else (np.inf if error.relative else 1.0)


def error(found: np.ndarray, wanted: np.ndarray) -> Error:
    """In float64, block by block; a NaN or an infinity on one side alone makes all of it NaN."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    a, b = found.reshape(-1), wanted.reshape(-1)
    most, total, norm, own, other, product = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(a), BLOCK):
        x, y = (part[start : start + BLOCK].astype(np.float64) for part in (a, b))
        off = np.abs(x - y)
        most, total = np.maximum(most, off.max()), total + off.sum()
        norm, own, other, product = norm + off @ off, own + x @ x, other + y @ y, product + x @ y
    cosine = 1 - product / np.sqrt(own * other) if own and other else float(own != other)
    relative = np.sqrt(norm / other) if other else (np.inf if norm else 0.0)
    return Error(float(most), float(total / max(1, len(a))), float(relative), max(0.0, float(cosine)) if cosine == cosine else float("nan"))


def seen(name: str, value: np.ndarray, inputs: Inputs) -> np.ndarray:
    """A stage without what pads compute, which is of no consequence: [n, ...]."""
    if not name.startswith(("decoder", "logits")):
        return value
    return value[np.broadcast_to(inputs.valid[:, None] if name.endswith("weights") else inputs.valid, value.shape[:-1])]


def limits(name: str, layers: int, narrow: bool) -> tuple[float, float]:
    """The limits of a float32 stage, or in bfloat16 of any, after so many layers."""
    if narrow:
        return NARROW, NARROW
    return GROWTH * (1 + layers) ** 0.5, WEIGHTS if name.endswith("weights") else LOCAL
