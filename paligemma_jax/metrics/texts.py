"""Metrics of longer texts by edits and subsequences: scores, transcriptions, reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from paligemma_jax.metrics.answers import exact_match
from paligemma_jax.metrics.packages import load_package
from paligemma_jax.metrics.scores import Metric, References, Scores, Texts, mean, mean_fraction

BETA = 1.2  # weight of recall in Rouge-L


def _error_rate(split: Callable[[str], Sequence], title: str, unit: str) -> Metric:
    """A metric of edits per unit of the references, in all cases together."""

    def scores(predictions: Texts, references: References) -> Scores:
        levenshtein = load_package("rapidfuzz.distance", title).Levenshtein
        edits, lengths = [], []
        for prediction, texts in zip(predictions, references, strict=True):
            parts = [split(text) for text in texts]
            distances = [levenshtein.distance(split(prediction), part) for part in parts]
            best = int(np.argmin(distances))
            edits.append(distances[best])
            lengths.append(len(parts[best]))
        edited, total = np.array(edits, float), np.array(lengths, float)
        if not total.sum():
            raise ValueError(f"{title} needs references that are not empty")

        def rate(weights: np.ndarray) -> float:
            return float(weights @ edited / max(weights @ total, 1))

        return Scores(edited / np.maximum(total, 1), rate)

    scores.__doc__ = f"""Edits (insertions, deletions, substitutions) per {unit} of the references.

    As in the code of the Sheet Music Transformer (antoniorv6/SMT, eval_functions.py at 8ffde90),
    which the PaliGemma 2 report follows for GrandStaff. Of several references, the nearest counts.
    """
    return Metric(scores, title, better="lower")


def _symbols(text: str) -> list[str]:
    """Symbols between spaces, with line breaks and tabs as symbols."""
    return text.replace("\n", " <b> ").replace("\t", " <t> ").split(" ")


cer = _error_rate(list, "character error rate", "character")
ser = _error_rate(_symbols, "symbol error rate", "symbol")
ler = _error_rate(lambda text: text.split("\n"), "line error rate", "line")


@partial(Metric, title="Rouge-L")
def rouge_l(predictions: Texts, references: References) -> Scores:
    """Rouge-L as in pycocoevalcap: the F-score, with recall weighted 1.2, of the longest common
    subsequence of words, with the best precision and the best recall over the references.

    Words are separated by single spaces, as in pycocoevalcap; no other tokenization is applied.
    """
    return mean_fraction(map(_rouge_l, predictions, references))


def _rouge_l(prediction: str, references: Sequence[str]) -> float:
    words = prediction.split(" ")
    others = [reference.split(" ") for reference in references]
    common = [common_length(words, other) for other in others]
    precision = max(length / len(words) for length in common)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for item in a:
        diagonal = 0
        for i, other in enumerate(b, 1):
            above = row[i]
            row[i] = diagonal + 1 if item == other else max(above, row[i - 1])
            diagonal = above
    return row[-1]


@partial(Metric, title="pair accuracy", case_title="both of its pair are right")
def mmvp_pairs(predictions: Texts, references: References) -> Scores:
    """MMVP's accuracy (arXiv:2401.06209): a pair of questions counts if both answers are right.

    Rows 1 and 2 are a pair, rows 3 and 4, and so on, as published. Answers are compared as by
    `exact_match`.

    Raises:
        ValueError: The number of rows is odd.
    """
    if len(predictions) % 2:
        raise ValueError(f"mmvp_pairs needs pairs of rows, got {len(predictions)} rows")
    right = exact_match.scores(predictions, references).each.reshape(-1, 2)
    return mean(np.repeat(right.min(axis=1), 2))
