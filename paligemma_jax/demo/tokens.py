"""How sure a model was: the probability of every token of an answer, and what it would have said instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paligemma_jax.inference import scoring
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.image import pixel_values
from paligemma_jax.processing.processor import Inputs, round_up

COUNT = 3  # alternatives


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    text: str | None  # None is the end of the answer
    probability: float
    others: tuple[tuple[str | None, float], ...]  # the likeliest others


def probabilities(predictor: Predictor, images: list[Any], prompt: str, text: str) -> list[Token]:
    """Every token of an answer and its end, by one teacher-forced pass over the text, which is cut into tokens as the tokenizer cuts it."""
    processor = predictor.processor
    (row,) = processor.rows([images], [prompt], [text])
    length = min(round_up(len(row.prompt) + len(row.suffix)), processor.context)
    inputs = Inputs(images=pixel_values(images, processor.image_size), **processor.pad([row], length=length))
    own, tokens, others = scoring.alternatives(predictor.model, inputs, COUNT + 1)
    word = lambda i: None if i == processor.tokenizer.eos_id else processor.decode([i])
    instead = [tuple((word(i), p) for i, p in zip(*pair) if i != said)[:COUNT] for said, *pair in zip(row.suffix, tokens, np.exp(others).tolist())]
    return [Token(word(said), float(np.exp(p)), rest) for said, p, rest in zip(row.suffix, own, instead)]
