"""."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What one prompt was answered."""

    text: str
    tokens: list[int]  # up to and with eos, or the one that completes a stop text
    log_probabilities: list[float]  # of each token under the model, before any filter
    score: float  # their sum; for Beam divided by length ** length_penalty
    error: str | None = None  # why there is no answer: its image could not be read
