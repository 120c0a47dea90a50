"""Token probabilities of an answer, from one teacher-forced pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from paligemma_jax.inference import scoring
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.processor import Inputs, round_up

ALTERNATIVES = 3  # per token


@dataclass(frozen=True)
class Token:
    """One token of an answer. A text of None is the end of the answer."""

    text: str | None
    probability: float
    alternatives: tuple[tuple[str | None, float], ...]  # other tokens, the most likely first


def token_probabilities(
    predictor: Predictor, images: Sequence[Image.Image], prompt: str, text: str
) -> list[Token]:
    """Return the tokens of an answer, including the end. `text` is tokenized again."""
    tokenizer = predictor.processor.tokenizer

    def piece(token: int) -> str | None:
        return None if token == tokenizer.eos_id else tokenizer.decode([token])

    tokens = []
    for token, log_probability, top, top_log in zip(
        *_teacher_forced(predictor, images, prompt, text), strict=True
    ):
        others = [
            (piece(other), float(np.exp(value)))
            for other, value in zip(top.tolist(), top_log, strict=True)
            if other != token
        ]
        probability = float(np.exp(log_probability))
        tokens.append(Token(piece(token), probability, tuple(others[:ALTERNATIVES])))
    return tokens


def score_answer(
    predictor: Predictor, images: Sequence[Image.Image], prompt: str, text: str
) -> Answer:
    """Return a streamed answer with its tokens and their log-probabilities."""
    tokens, log_probabilities, _, _ = _teacher_forced(predictor, images, prompt, text)
    return Answer(text, tokens, log_probabilities.tolist(), float(log_probabilities.sum()))


def _teacher_forced(
    predictor: Predictor, images: Sequence[Image.Image], prompt: str, text: str
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens [N] of an answer, their log-probabilities, and the top tokens [N, K].

    K is one more than `ALTERNATIVES`, because the token itself may be among them.
    """
    processor = predictor.processor
    (row,) = processor.encode([images], [prompt], [text])
    length = min(round_up(len(row.prompt) + len(row.suffix)), processor.context)
    pixels = processor.pixel_values(list(images))
    inputs = Inputs(images=pixels, **processor.pad([row], length=length))
    return list(row.suffix), *scoring.alternatives(predictor.model, inputs, ALTERNATIVES + 1)
