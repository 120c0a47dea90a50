"""What a metric says of a set of cases: of each case, of all of them, and of any resampling of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scores:
    """`total(weights)` is the metric of the set in which case i occurs weights[i] times; `each` ranks the cases."""

    each: np.ndarray  # float64[N]
    total: Callable[[np.ndarray], float]  # of float64[N]

    def value(self) -> float:
        return float(self.total(np.ones(len(self.each))))


class Metric:
    """A function `(predictions, references) -> float`, made of one that gives `Scores`.

    predictions: one a case. references: one a case, or a list of those that are right. ValueError if they are not as many, or none.
    percent: whether papers print it times 100. better: "higher", "lower", or "" where neither is.
    """

    def __init__(self, scores: Callable[..., Scores], percent: bool = True, better: str = "higher"):
        update_wrapper(self, scores)
        self._scores, self.percent, self.better = scores, percent, better

    def scores(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> Scores:
        if len(predictions) != len(references) or not len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one for each case")
        return self._scores(predictions, [[right] if isinstance(right, str) else right for right in references], **options)

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> float:
        return self.scores(predictions, references, **options).value()


def mean(values: Iterable[float]) -> Scores:
    each = np.array(list(values), float)
    return Scores(each, lambda weights: float(weights @ each / weights.sum()))


def ratio(over: Any, under: Any) -> float:
    return float(over / under) if under else 0.0
