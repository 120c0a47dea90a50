"""Metrics of short answers. `references` has, for each case, all correct answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from paligemma_jax.metrics.scores import Metric, References, Scores, Texts, mean_fraction, ratio

# ---- VQA: https://visualqa.org/evaluation.html, with all quirks of its published code
# (GT-Vision-Lab/VQA, vqaEval.py).

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
COUNTS = """zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
NUMERALS = {name: str(number) for number, name in enumerate(COUNTS.split())} | {"none": "0"}
DIGITS = {name: digits for name, digits in NUMERALS.items() if int(digits) <= 10}
# Each also occurs with one of its apostrophes missing.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've"""
REPAIRED = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, character in enumerate(word)
    if character == "'"
}
REPAIRED["somebody'd"] = "somebodyd"  # as published


def normalise(answer: str) -> str:
    """Normalise an answer as the VQA evaluation does.

    Removes punctuation and articles, writes numbers up to ten as digits, restores apostrophes.
    """
    # A mark beside a space is deleted, else it becomes a space. With a number like 2,000 in the
    # answer, all marks are deleted.
    has_thousands = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        delete = has_thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if delete else " ")
    # The published code passes re.UNICODE, which is 32, in place of the count.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ARTICLES)


@partial(Metric, title="VQA accuracy")
def vqa(predictions: Texts, references: References) -> Scores:
    """VQA accuracy: min(1, number of people who gave this answer / 3), averaged over leaving out
    each person in turn.

    Answers are normalised where people disagree.

    Raises:
        ValueError: Fewer than four people answered, so that no answer could score 1.
    """
    return mean_fraction(map(_vqa, predictions, references))


def _vqa(prediction: str, people: Sequence[str]) -> float:
    if len(people) < 4:
        raise ValueError(
            "VQA accuracy needs the answers of at least four people (VQAv2 has ten), "
            f"got {list(people)}: use exact_match"
        )
    texts = (prediction, *people)
    texts = [text.replace("\n", " ").replace("\t", " ").strip() for text in texts]
    if len(set(texts[1:])) > 1:
        texts = [normalise(text) for text in texts]
    agrees = [person == texts[0] for person in texts[1:]]
    return sum(min(1, (sum(agrees) - left_out) / 3) for left_out in agrees) / len(agrees)


# ---- One correct answer, or any of several


def _best(score: Callable[[str, str], float], predictions: Texts, references: References) -> Scores:
    """Score each prediction against its most similar reference."""
    return mean_fraction(
        max((float(score(prediction, answer)) for answer in answers), default=0.0)
        for prediction, answers in zip(predictions, references, strict=True)
    )


@partial(Metric, title="exact match")
def exact_match(predictions: Texts, references: References) -> Scores:
    """The fraction that equals a reference, except for surrounding spaces."""
    return _best(lambda a, b: a.strip() == b.strip(), predictions, references)


@partial(Metric, title="relaxed accuracy")
def relaxed_accuracy(predictions: Texts, references: References) -> Scores:
    """ChartQA's accuracy (arXiv:2203.10244): numbers within 5 %, other answers equal.

    Case is ignored, as in big_vision.
    """
    return _best(_relaxed, predictions, references)


def _relaxed(prediction: str, reference: str) -> bool:
    value, expected = _number(prediction), _number(reference)
    if value is not None and expected:  # 0 equals only "0"
        return abs(value - expected) / abs(expected) <= 0.05
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@partial(Metric, title="ANLS")
def anls(predictions: Texts, references: References) -> Scores:
    """DocVQA's average normalised Levenshtein similarity (arXiv:1907.00490, equation 1).

    1 - distance / longer length, or 0 if that is at most 0.5. Case is ignored, as in the paper and
    big_vision.
    """
    return _best(lambda a, b: _similarity(a.lower(), b.lower()), predictions, references)


def _similarity(a: str, b: str) -> float:
    distance = _levenshtein(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < 0.5 else 0.0


def _levenshtein(a: str, b: str) -> int:
    """The number of insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@partial(Metric, title="TallyQA accuracy")
def tallyqa(predictions: Texts, references: References) -> Scores:
    """The fraction of correct counts; "none" and "zero" to "twenty" are numbers (big_vision)."""
    return _best(lambda a, b: _numeral(a) == _numeral(b), predictions, references)


def _numeral(text: str) -> str:
    return NUMERALS.get(text.lower(), text)


@partial(Metric, title="RSVQA accuracy")
def rsvqa(predictions: Texts, references: References) -> Scores:
    """RSVQA's overall accuracy (arXiv:2003.07333), ignoring case; see `average_accuracy`."""
    return _best(lambda a, b: a.lower() == b.lower(), predictions, references)


def average_accuracy(predictions: Texts, references: References, types: Sequence[str]) -> float:
    """RSVQA's average accuracy: the mean of the accuracies of each type of question."""
    each, kinds = rsvqa.scores(predictions, references).each, np.array(types)
    return float(np.mean([each[kinds == kind].mean() for kind in set(types)]))


# ---- POPE (arXiv:2305.10355): as in its published evaluate.py, an answer is negative if its first
# sentence has the word No, no or not.

TP, FP, TN, FN = np.eye(4)  # true and false positives and negatives


def _pope(
    predictions: Texts, references: References, numerator: np.ndarray, denominator: np.ndarray
) -> Scores:
    """The ratio of two sums of the numbers of (TP, FP, TN, FN)."""
    words = [set(text.split(".")[0].replace(",", "").split(" ")) for text in predictions]
    predicted = np.array([not {"No", "no", "not"} & sentence for sentence in words])
    actual = np.array([answers[0] != "no" for answers in references])
    cells = (predicted & actual, predicted & ~actual, ~predicted & ~actual, ~predicted & actual)
    table = np.stack(cells, axis=1).astype(float)
    top, bottom = table @ numerator, table @ denominator
    correct = (predicted == actual).astype(float)
    return Scores(correct, lambda weights: ratio(weights @ top, weights @ bottom), bottom > 0)


@partial(Metric, title="POPE accuracy")
def pope_accuracy(predictions: Texts, references: References) -> Scores:
    """The fraction of correct answers."""
    return _pope(predictions, references, TP + TN, TP + FP + TN + FN)


@partial(Metric, title="POPE precision")
def pope_precision(predictions: Texts, references: References) -> Scores:
    """The fraction of positive answers that is correct."""
    return _pope(predictions, references, TP, TP + FP)


@partial(Metric, title="POPE recall")
def pope_recall(predictions: Texts, references: References) -> Scores:
    """The fraction of positive references that is answered positively."""
    return _pope(predictions, references, TP, TP + FN)


@partial(Metric, title="POPE F1")
def pope_f1(predictions: Texts, references: References) -> Scores:
    """The harmonic mean of precision and recall."""
    return _pope(predictions, references, 2 * TP, 2 * TP + FP + FN)
