"""Answers with boxes as training sequences: their order, and noise boxes (pix2seq).

A detector that answers with text learns when to stop from the number of boxes in its answers, and
stops too early: it misses objects. pix2seq (arXiv:2109.10852, 2.3) trains on answers of a constant
number of boxes instead. Those after the objects are noise, with a label that says so. Their
locations are not trained, only their labels, which so become the confidence of a box.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from paligemma_jax.data.rows import Example
from paligemma_jax.processing.locations import BOX, LAST_BIN, location_tokens
from paligemma_jax.processing.processor import EncodedPrompt
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.training.config import FinetuneConfig

NOISE = "noise"  # the label of boxes without an object
JITTER = 0.5  # largest shift of an edge of a noise box near an object, in units of the object
SMALLEST = 20  # side of a noise box, in location bins


@dataclass(frozen=True)
class BoxSequences:
    """Reorders the boxes of an answer, and appends noise boxes up to a number of boxes.

    Only answers that consist of boxes with labels are changed, and empty answers to `detect`. Noise
    is not added to answers with masks.
    """

    order: str = "given"  # given, random, area (largest first) or position (top to bottom)
    count: int = 0  # of all boxes; 0 adds none

    @classmethod
    def of(cls, config: FinetuneConfig) -> BoxSequences:
        """The sequences of a run."""
        return cls(config.box_order, config.noise_boxes)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Deterministic in the state of `rng`."""
        parts = [part for part in re.split(r"\s*;\s*", example.suffix.strip()) if part]
        detects = parts or example.prefix.startswith("detect ")
        if self == BoxSequences() or not detects or not all(map(BOX.match, parts)):
            return example
        boxes = [np.array(re.findall(r"\d{4}", part)[:4], float) for part in parts]
        parts = [parts[i] for i in self._order(boxes, rng)]
        noise = [] if "<seg" in example.suffix else self._noise(boxes, rng)
        texts = [*parts, *(f"{location_tokens(box)} {NOISE}" for box in noise)]
        return replace(
            example, suffix=" ; ".join(texts), trained_boxes=len(parts) if noise else None
        )

    def _order(self, boxes: list[np.ndarray], rng: np.random.Generator) -> Iterable[int]:
        keys = {
            "given": lambda i: i,
            "area": lambda i: -np.prod(boxes[i][2:] - boxes[i][:2]),
            "position": lambda i: tuple(boxes[i][:2]),
        }
        if self.order == "random":
            return rng.permutation(len(boxes)).tolist()
        return sorted(range(len(boxes)), key=keys[self.order])

    def _noise(self, boxes: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Random boxes, and, as often, objects whose edges are shifted at random."""
        noise = []
        for _ in range(self.count - len(boxes)):
            if boxes and rng.random() < 0.5:
                box = boxes[rng.integers(len(boxes))]
                sides = np.tile(box[2:] - box[:2], 2)
                corners = np.reshape(box + sides * rng.uniform(-JITTER, JITTER, 4), (2, 2))
            else:
                corners = rng.uniform(0, LAST_BIN, (2, 2))
            low = np.clip(corners.min(axis=0), 0, LAST_BIN - SMALLEST)
            high = np.clip(corners.max(axis=0), low + SMALLEST, LAST_BIN)
            noise.append(np.concatenate([low, high]))
        return noise


def without_noise_locations(
    row: EncodedPrompt, trained_boxes: int, tokenizer: Tokenizer
) -> EncodedPrompt:
    """Train only the first boxes' locations of an answer, and all labels."""
    ids = location_ids(tokenizer)
    places = [place for place, token in enumerate(row.suffix) if token in ids]
    return replace(row, untrained=tuple(places[4 * trained_boxes :]))


@lru_cache(maxsize=4)
def location_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The token ids of all locations."""
    return frozenset(tokenizer.encode(location_tokens(range(LAST_BIN + 1))))
