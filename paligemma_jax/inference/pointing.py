"""From an answer to what it points at: boxes with scores, and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.locations import Detections, parse_detections, with_masks
from paligemma_jax.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from paligemma_jax.inference.answer import Answer
    from paligemma_jax.inference.predictor import Predictor


def detections(predictor: Predictor, answer: Answer | str, image: ImageSource) -> Detections:
    """See `Predictor.detections`."""
    size = load_image(image).size
    found = parse_detections(answer if isinstance(answer, str) else list(pieces(predictor.processor.tokenizer, answer)), size)
    return with_masks(found, size, predictor.codec) if any(thing.codes for thing in found) else found


def pieces(tokenizer: Tokenizer, answer: Answer) -> Iterator[tuple[str, float]]:
    """The text of each token of an answer, and its log-probability; a character of several tokens is the last one's. Joined they are the answer."""
    ids, told = answer.tokens, 0
    for n, value in enumerate(answer.log_probabilities, 1):
        sure = ids[:n] if n == len(ids) else ids[: tokenizer.settled(ids[:n])]
        known = min(len(tokenizer.decode(sure)), len(answer.text))  # a stop text cuts the answer
        yield answer.text[told:known], value
        told = known
