"""Scores of a set of cases, and the metrics that compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Literal, SupportsFloat

import numpy as np

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # for each case, all correct answers


@dataclass(frozen=True)
class Scores:
    """The score of each case, and of any resampling of the cases."""

    each: np.ndarray  # float64[N]
    total: Callable[[np.ndarray], float]  # float64[N], how often each case occurs -> the metric
    # bool[N]: the cases that count, if they score from 0 to 1 and the metric does too.
    trials: np.ndarray | None = None

    def value(self) -> float:
        """The metric of all cases."""
        return float(self.total(np.ones(len(self.each))))


class Metric:
    """A function `(predictions, references) -> float`, made from one that returns `Scores`.

    Args:
        scores: `(predictions, references, **options) -> Scores`. A string reference is passed as a
            list of one.
        title: Name in reports.
        case_title: Name of a single case's score, if it differs.
        compares: Type of predictions and references, per case: texts and lists of texts, lists of
            detections, one box, or one mask.
        percent: Whether papers print the value times 100.
        better: The direction of improvement, if any.
    """

    def __init__(
        self,
        scores: Callable[..., Scores],
        title: str,
        case_title: str = "",
        compares: Literal["texts", "detections", "box", "mask"] = "texts",
        percent: bool = True,
        better: Literal["higher", "lower", ""] = "higher",
    ):
        update_wrapper(self, scores)
        self._scores, self.title, self.case_title = scores, title, case_title or title
        self.compares, self.percent, self.better = compares, percent, better

    def scores(self, predictions: Sequence, references: Sequence, **options: object) -> Scores:
        """Score predictions.

        Args:
            predictions: One per case.
            references: One per case, or a list of all correct ones per case.

        Raises:
            ValueError: There are no predictions, or not as many as references.
        """
        if len(predictions) != len(references) or not len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: "
                "pass one of each per case"
            )
        if self.compares == "texts":
            references = [[item] if isinstance(item, str) else item for item in references]
        return self._scores(predictions, references, **options)

    def __call__(self, predictions: Sequence, references: Sequence, **options: object) -> float:
        """The metric of all cases; arguments are those of `scores`."""
        return self.scores(predictions, references, **options).value()


def mean(values: Iterable[float]) -> Scores:
    """Scores whose total is their mean."""
    each = np.array(list(values), float)
    return Scores(each, lambda weights: float(weights @ each / weights.sum()))


def mean_fraction(values: Iterable[float]) -> Scores:
    """Like `mean`, for values from 0 to 1, whose mean has the same bounds."""
    scores = mean(values)
    return Scores(scores.each, scores.total, np.ones(len(scores.each), bool))


def ratio(numerator: SupportsFloat, denominator: SupportsFloat) -> float:
    """The quotient, or 0 if the denominator is 0."""
    return float(numerator) / float(denominator) if denominator else 0.0
