"""Metrics of short answers. `references` hold, for each case, the answers that are right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.metrics.scores import Metric, Scores, mean, ratio

Texts = Sequence[str]
Rights = Sequence[Sequence[str]]

# ---- VQA: https://visualqa.org/evaluation.html, as its published code (GT-Vision-Lab/VQA, vqaEval.py) does it, peculiarities included.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
COUNTS = """zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
NUMERALS = {name: str(number) for number, name in enumerate(COUNTS.split())} | {"none": "0"}
DIGITS = {name: digits for name, digits in NUMERALS.items() if int(digits) <= 10}
# Each is also written with one of its apostrophes missing.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've"""
REPAIRED = {word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i, mark in enumerate(word) if mark == "'"}
REPAIRED["somebody'd"] = "somebodyd"  # as published


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it: no punctuation, no articles, numbers up to ten as digits, apostrophes put back."""
    number = re.search(r"\d,\d", answer) is not None  # then all punctuation is dropped, as it is where a space stands beside it; else it is a space
    text = answer
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if number or f"{mark} " in answer or f" {mark}" in answer else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the code passes re.UNICODE, which is 32, in the place of the count
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ARTICLES)


@Metric
def vqa(predictions: Texts, references: Rights) -> Scores:
    """VQA accuracy: the mean, over leaving out one person at a time, of min(1, how many of the others gave this answer / 3).

    Answers are normalised where people disagree. ValueError where fewer than four answered: nothing could reach 1.
    """
    return mean(map(_vqa, predictions, references))


def _vqa(prediction: str, people: Sequence[str]) -> float:
    if len(people) < 4:
        raise ValueError(f"VQA accuracy compares with what several people answered, ten in VQAv2; here there are {list(people)}: take exact_match")
    said, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *people))
    if len(set(people)) > 1:
        said, *people = map(normalise, (said, *people))
    same = [person == said for person in people]
    return sum(min(1, (sum(same) - left_out) / 3) for left_out in same) / len(same)


# ---- One right answer, or any of several


def _best(score: Callable[[str, str], float], predictions: Texts, references: Rights) -> Scores:
    return mean(max((float(score(said, right)) for right in rights), default=0.0) for said, rights in zip(predictions, references))


@Metric
def exact_match(predictions: Texts, references: Rights) -> Scores:
    """The share that equal a right answer, but for spaces around them."""
    return _best(lambda said, right: said.strip() == right.strip(), predictions, references)


@Metric
def relaxed_accuracy(predictions: Texts, references: Rights) -> Scores:
    """ChartQA (arXiv:2203.10244): numbers may be off by 5 %, other answers must be the same; without case, as big_vision compares them."""
    return _best(_relaxed, predictions, references)


def _relaxed(said: str, right: str) -> bool:
    numbers = _number(said), _number(right)
    if numbers[0] is not None and numbers[1]:  # 0 is only met by "0"
        return abs(numbers[0] - numbers[1]) / abs(numbers[1]) <= 0.05
    return said.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@Metric
def anls(predictions: Texts, references: Rights) -> Scores:
    """DocVQA's average normalised Levenshtein similarity (arXiv:1907.00490, equation 1): 1 - distance / longer length, or 0 from half on.

    Without case, as the paper and big_vision have it.
    """
    return _best(lambda said, right: _similarity(said.lower(), right.lower()), predictions, references)


def _similarity(said: str, right: str) -> float:
    distance = _distance(said, right) / max(len(said), len(right), 1)
    return 1 - distance if distance < 0.5 else 0.0


def _distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


@Metric
def tallyqa(predictions: Texts, references: Rights) -> Scores:
    """The share of right counts; "none" and "zero" to "twenty" are their numerals (big_vision)."""
    plain = lambda text: NUMERALS.get(text.lower(), text)
    return _best(lambda said, right: plain(said) == plain(right), predictions, references)


@Metric
def rsvqa(predictions: Texts, references: Rights) -> Scores:
    """The overall accuracy of RSVQA (arXiv:2003.07333), without case; its average accuracy is the mean over the question types."""
    return _best(lambda said, right: said.lower() == right.lower(), predictions, references)


def average_accuracy(predictions: Texts, references: Rights, types: Sequence[str]) -> float:
    """RSVQA's average accuracy: the mean over question types of the accuracy of each."""
    each = rsvqa.scores(predictions, references).each
    return float(np.mean([each[[other == kind for other in types]].mean() for kind in set(types)]))


# ---- POPE (arXiv:2305.10355), as its published evaluate.py reads answers: no if the first sentence says No, no or not, else yes


def _confusion(predictions: Texts, references: Rights, of: Callable[[float, float, float, float], float]) -> Scores:
    """of: true positives, false positives, true negatives, false negatives -> the metric."""
    said = np.array([not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) for text in predictions])
    right = np.array([rights[0] != "no" for rights in references])
    cells = np.stack([said & right, said & ~right, ~said & ~right, ~said & right], axis=1).astype(float)
    return Scores((said == right).astype(float), lambda weights: of(*(weights @ cells)))


@Metric
def pope_accuracy(predictions: Texts, references: Rights) -> Scores:
    return _confusion(predictions, references, lambda tp, fp, tn, fn: ratio(tp + tn, tp + fp + tn + fn))


@Metric
def pope_precision(predictions: Texts, references: Rights) -> Scores:
    return _confusion(predictions, references, lambda tp, fp, tn, fn: ratio(tp, tp + fp))


@Metric
def pope_recall(predictions: Texts, references: Rights) -> Scores:
    return _confusion(predictions, references, lambda tp, fp, tn, fn: ratio(tp, tp + fn))


@Metric
def pope_f1(predictions: Texts, references: Rights) -> Scores:
    return _confusion(predictions, references, lambda tp, fp, tn, fn: ratio(2 * tp, 2 * tp + fp + fn))
