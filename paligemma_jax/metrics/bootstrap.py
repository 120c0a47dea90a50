"""How sure a figure is: the bootstrap over cases (Efron, 1979), and over the cases of two runs at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from paligemma_jax.metrics.scores import Scores

EDGES = 2.5, 97.5  # percentiles of an interval that holds the true value 95 times in 100


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """Of ours less theirs; p: how often chance alone would give one as large, in either direction."""

    p: float


def interval(scores: Scores, samples: int = 1000, seed: int = 0, members: Sequence[int] | None = None) -> Interval:
    """members: of these cases alone."""
    cases = len(scores.each)
    own = np.arange(cases) if members is None else np.asarray(members)
    value = float(scores.total(np.bincount(own, minlength=cases).astype(float)))
    return Interval(value, *_edges([scores.total(weights) for weights in _resamplings(own, cases, samples, seed)], value))


def difference(ours: Scores, theirs: Scores, samples: int = 1000, seed: int = 0) -> Difference:
    """Both have the same cases in the same order, and each resampling takes the same of both: what is hard for both cancels."""
    cases = len(ours.each)
    found = [ours.total(weights) - theirs.total(weights) for weights in _resamplings(np.arange(cases), cases, samples, seed)]
    tail = min(sum(value <= 0 for value in found), sum(value >= 0 for value in found))
    value = ours.value() - theirs.value()
    return Difference(value, *_edges(found, value), min(1.0, 2 * (tail + 1) / (samples + 1)))


def _resamplings(own: np.ndarray, cases: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """float64[N]: how often each case is drawn, as many as are in `own`."""
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield np.bincount(rng.choice(own, len(own)), minlength=cases).astype(float)


def _edges(found: list[float], value: float) -> tuple[float, float]:
    known = [one for one in found if not np.isnan(one)]  # a resampling without any object has no AP
    low, high = np.percentile(known, EDGES) if known else (value, value)
    return float(low), float(high)
