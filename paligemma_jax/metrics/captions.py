"""Metrics of captions. `references` has, for each image, the captions that several people wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from paligemma_jax.metrics.packages import load_package
from paligemma_jax.metrics.scores import Metric, References, Scores, Texts, mean, ratio

# ---- Tokens of the COCO caption evaluation: Stanford's PTBTokenizer (-lowerCase), no punctuation

STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " ", "—": " ", "…": " "})
# Not removed, because the evaluation's list of punctuation has their names in capitals.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|ave|jr|sr|inc|ltd|co|corp|etc|vs|ft|lt|sgt|gen"
    "|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec"
)
FUSED = re.compile(r"\b(can|gon|wan|got|lem|gim)(not|na|ta|me)\b")  # can not, gon na, lem me
TOKEN = re.compile(
    rf"""https?://\S*\w | [\w.+-]+@[\w-]+(?:\.[\w-]+)+            # addresses
    | (?:[a-z]\.){{2,}} | \b(?:{ABBREVIATIONS})\. | \bno\.(?=\s*\d)  # u.s., st., no. 5
    | \w+?(?=n't\b) | n't\b | 'n' | '(?:s|m|d|ll|re|ve)\b           # do n't, it 's, rock 'n' roll
    | 't(?=is\b|was\b) | (?<='t)(?:is|was)
    | ,?\d+(?:[.,:]\d+)*(?=[ap]m\b) | ,?\d+(?:[.,:/-]\d+)+ | ,\d+   # 10:45 pm, 2,000, 1/2
    | \w+(?:[-/]\w+)* (?:'(?!n'|(?:s|m|d|ll|re|ve|t)\b)\w+(?:-\w+)*)?  # t-shirt, and/or, o'neil
    | [#&*@+=~^<>/%$£€|\\] | [()\[\]{{}}]""",
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Split into lower-case tokens without punctuation; contractions are split ("do n't").

    Implements only the rules that captions need: PTBTokenizer knows more abbreviations, and detects
    the end of a sentence within a line.
    """
    text = FUSED.sub(r"\1 \2", caption.lower().translate(STRAIGHT))
    tokens: list[str] = TOKEN.findall(text)
    return [BRACKETS.get(token, token) for token in tokens]


# ---- CIDEr-D (arXiv:1411.5726), as in pycocoevalcap's CiderScorer

SIGMA = 6.0  # of the length penalty

NGrams = Counter[tuple[str, ...]]
Vector = dict[tuple[str, ...], float]


@partial(Metric, title="CIDEr-D")
def cider(predictions: Texts, references: References) -> Scores:
    """CIDEr-D: similarity of 1- to 4-grams, in which rare ones weigh more.

    From 0 to 10; papers print it times 100. Frequencies are those of all `references`, also in a
    resampling: a single image scores 0.
    """
    for i, captions in enumerate(references):
        if not captions:
            raise ValueError(f"case {i} has no reference caption")
    ngrams = [[_ngrams(caption) for caption in captions] for captions in references]
    images = Counter(gram for captions in ngrams for gram in set().union(*captions))

    def tf_idf(grams: NGrams) -> Vector:
        idf = {gram: np.log(len(references) / max(images[gram], 1)) for gram in grams}
        return {gram: count * idf[gram] for gram, count in grams.items()}

    def score(prediction: NGrams, captions: list[NGrams]) -> float:
        vector = tf_idf(prediction)
        similarities = [
            _cosine(vector, tf_idf(caption)) * _length_penalty(prediction, caption)
            for caption in captions
        ]
        return 10 * float(np.mean(similarities))

    return mean(map(score, map(_ngrams, predictions), ngrams))


def _ngrams(caption: str) -> NGrams:
    tokens = tokenize(caption)
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1)
    )


def _cosine(prediction: Vector, reference: Vector) -> float:
    """The mean over n = 1 to 4, the prediction clipped to the reference."""
    product, squares = np.zeros(4), np.zeros((2, 4))
    for side, vector in enumerate((prediction, reference)):
        for gram, weight in vector.items():
            squares[side, len(gram) - 1] += weight**2
    for gram in prediction.keys() & reference.keys():
        product[len(gram) - 1] += min(prediction[gram], reference[gram]) * reference[gram]
    norms = np.sqrt(squares.prod(axis=0))
    return float(np.mean(np.divide(product, norms, out=np.zeros(4), where=norms > 0)))


def _length_penalty(prediction: NGrams, reference: NGrams) -> float:
    """Penalty on a difference in length, which pycocoevalcap counts in bigrams."""
    lengths = [
        sum(count for gram, count in grams.items() if len(gram) == 2)
        for grams in (prediction, reference)
    ]
    return float(np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2)))


@partial(Metric, title="BLEU", percent=False)
def bleu(predictions: Texts, references: References) -> Scores:
    """Corpus BLEU of sacrebleu (its 13a tokens), from 0 to 100."""
    metric = load_package("sacrebleu.metrics.bleu", "BLEU").BLEU
    sentence = metric(effective_order=True)
    scores = [
        sentence.sentence_score(caption, list(captions))
        for caption, captions in zip(predictions, references, strict=True)
    ]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], float)

    def total(weights: np.ndarray) -> float:
        sums = (weights @ counts).round().astype(int).tolist()
        lengths = sums[8], sums[9]
        return metric.compute_bleu(sums[:4], sums[4:8], *lengths, smooth_method="exp").score

    return Scores(np.array([score.score for score in scores]), total)


# ---- Long captions (DOCCI): the columns of table 6 of the PaliGemma 2 report (arXiv:2412.03555)

SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?=["'“‘(\[]?[A-Z0-9])|\s*\n\s*"""
)
ABBREVIATION_END = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|no|vs|[a-z])\.$", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """Split at line ends, and at . ! or ? before a capital or a digit.

    An abbreviation such as "St." or an initial does not end a sentence.
    """
    sentences: list[str] = []
    for piece in SENTENCE_END.split(text.strip()):
        if sentences and ABBREVIATION_END.search(sentences[-1]):
            sentences[-1] += " " + piece
        elif piece:
            sentences.append(piece)
    return sentences


@partial(Metric, title="#char", percent=False, better="")
def characters(predictions: Texts, references: Sequence) -> Scores:
    """#char: the mean length of the predictions. References are ignored."""
    return mean(map(len, predictions))


@partial(Metric, title="#sent", percent=False, better="")
def sentences(predictions: Texts, references: Sequence) -> Scores:
    """#sent: the mean number of sentences of the predictions. References are ignored."""
    return mean(len(split_sentences(caption)) for caption in predictions)


@partial(Metric, title="NES", better="lower")
def non_entailment(
    predictions: Texts, references: Sequence, judge: Callable[[str, object], bool | None]
) -> Scores:
    """NES: the fraction of all sentences that the image does not support.

    The report asked five people about each sentence.

    Args:
        references: Whatever the judge needs: descriptions for a language model, images for people.
        judge: (sentence, reference) -> whether the reference supports it, or None if the sentence
            makes no claim.
    """
    verdicts = [
        [judge(sentence, reference) for sentence in split_sentences(caption)]
        for caption, reference in zip(predictions, references, strict=True)
    ]
    wrong = np.array([sum(verdict is False for verdict in case) for case in verdicts], float)
    judged = np.array([sum(verdict is not None for verdict in case) for case in verdicts], float)
    each = wrong / np.maximum(judged, 1)
    return Scores(each, lambda weights: ratio(weights @ wrong, weights @ judged))
