"""Metrics of captions. `references` hold, for each picture, what several people wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from paligemma_jax.metrics.answers import Rights, Texts
from paligemma_jax.metrics.scores import Metric, Scores, mean, ratio

# ---- The tokens of the COCO caption evaluation: those of Stanford's PTBTokenizer (-lowerCase), without punctuation

STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " ", "—": " ", "…": " "})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # kept by that evaluation, as its list is in capitals
ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|ave|jr|sr|inc|ltd|co|corp|etc|vs|ft|lt|sgt|gen|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec"
FUSED = re.compile(r"\b(can|gon|wan|got|lem|gim)(not|na|ta|me)\b")  # two tokens: can not, gon na, lem me
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
    """The caption in lower case, without punctuation, with contractions apart ("do n't", "man 's").

    The rules that captions meet, not all of PTBTokenizer: it knows more abbreviations, and where a sentence ends within a line.
    """
    tokens: list[str] = TOKEN.findall(FUSED.sub(r"\1 \2", caption.lower().translate(STRAIGHT)))
    return [BRACKETS.get(token, token) for token in tokens]


# ---- CIDEr-D (arXiv:1411.5726), as pycocoevalcap's CiderScorer computes it

SIGMA = 6.0  # of the penalty on a difference in length


@Metric
def cider(predictions: Texts, references: Rights) -> Scores:
    """CIDEr-D: how alike the 1- to 4-grams of caption and references are, rare ones weighing more. 0 to 10; papers print it times 100.

    Which n-grams are rare is a matter of all `references`: one picture alone scores 0. A resampling keeps those of the whole set.
    """
    if bare := [i for i, rights in enumerate(references) if not rights]:
        raise ValueError(f"case {bare[0]} has no reference caption")
    said = [_grams(caption) for caption in predictions]
    right = [[_grams(caption) for caption in captions] for captions in references]
    pictures = Counter(gram for captions in right for gram in set().union(*captions))
    weigh = lambda grams: {gram: count * np.log(len(right) / max(pictures[gram], 1)) for gram, count in grams.items()}

    def score(caption: Counter, others: list[Counter]) -> float:
        ours = weigh(caption)
        return 10 * float(np.mean([_cosine(ours, weigh(other)) * _penalty(caption, other) for other in others]))

    return mean(map(score, said, right))


def _grams(caption: str) -> Counter:
    tokens = tokenize(caption)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def _cosine(ours: dict, other: dict) -> float:
    """Of two captions' tf-idf vectors, ours clipped to the other; the mean over n = 1 to 4."""
    product, squares = np.zeros(4), np.zeros((2, 4))
    for side, weights in enumerate((ours, other)):
        for gram, weight in weights.items():
            squares[side, len(gram) - 1] += weight**2
    for gram in ours.keys() & other.keys():
        product[len(gram) - 1] += min(ours[gram], other[gram]) * other[gram]
    norms = np.sqrt(squares.prod(axis=0))
    return float(np.mean(np.divide(product, norms, out=np.zeros(4), where=norms > 0)))


def _penalty(ours: Counter, other: Counter) -> float:
    """On a difference in length, which that code counts in bigrams."""
    length, wanted = (sum(count for gram, count in grams.items() if len(gram) == 2) for grams in (ours, other))
    return float(np.exp(-((length - wanted) ** 2) / (2 * SIGMA**2)))


def sacrebleu() -> Any:
    """Its `BLEU`; ValueError where it is missing."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install 'paligemma-jax[eval]'") from None
    return BLEU


@partial(Metric, percent=False)
def bleu(predictions: Texts, references: Rights) -> Scores:
    """Corpus BLEU as sacrebleu computes it (its tokens, 13a), 0 to 100. ValueError where sacrebleu is missing."""
    BLEU = sacrebleu()
    sentence = BLEU(effective_order=True)
    found = [sentence.sentence_score(caption, list(rights)) for caption, rights in zip(predictions, references)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], float)

    def total(weights: np.ndarray) -> float:
        sums = (weights @ counts).round().astype(int).tolist()
        return BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score

    return Scores(np.array([one.score for one in found]), total)


# ---- Long captions (DOCCI): the columns of table 6 of the PaliGemma 2 report (arXiv:2412.03555)

SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?=["'“‘(\[]?[A-Z0-9])|\s*\n\s*""")
NO_END = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|no|vs|[a-z])\.$", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """At a full stop, question or exclamation mark before a capital or a digit, not after "St." or an initial; and where a line ends."""
    whole: list[str] = []
    for piece in SENTENCE_END.split(text.strip()):
        if whole and NO_END.search(whole[-1]):
            whole[-1] += " " + piece
        elif piece:
            whole.append(piece)
    return whole


@partial(Metric, percent=False, better="")
def characters(predictions: Texts, references: Sequence[Any]) -> Scores:
    """#char: how long the predictions are. The references play no part."""
    return mean(map(len, predictions))


@partial(Metric, percent=False, better="")
def sentences(predictions: Texts, references: Sequence[Any]) -> Scores:
    """#sent: how many sentences the predictions have. The references play no part."""
    return mean(len(split_sentences(caption)) for caption in predictions)


@partial(Metric, better="lower")
def non_entailment(predictions: Texts, references: Sequence[Any], judge: Callable[[str, Any], bool | None]) -> Scores:
    """NES: the share of all sentences that do not follow from what is seen; the report asked five people about each.

    judge: (sentence, the case's references) -> whether it follows from them, None for a sentence that says nothing to assess. The references
    are whatever the judge looks at: descriptions for a language model, pictures for people.
    """
    verdicts = [[judge(sentence, right) for sentence in split_sentences(caption)] for caption, right in zip(predictions, references)]
    wrong = np.array([sum(verdict is False for verdict in case) for case in verdicts], float)
    assessed = np.array([sum(verdict is not None for verdict in case) for case in verdicts], float)
    return Scores(wrong / np.maximum(assessed, 1), lambda weights: ratio(weights @ wrong, weights @ assessed))
