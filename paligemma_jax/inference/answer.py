"""Turn generated tokens into answers: their text, end and pieces."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32

from paligemma_jax.inference.sampling import Beam, Strategy
from paligemma_jax.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt."""

    text: str
    tokens: list[int]  # up to and including eos, or the token that completes a stop text
    log_probabilities: list[float]  # of each token under the model, before any filter
    score: float  # their sum; for Beam divided by length ** length_penalty
    error: str | None = None  # why there is no answer: its image could not be read

    def pieces(self, tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
        """The text and log-probability of each token. The texts join to the answer's.

        A character that takes several tokens belongs to the last one.
        """
        start, last = 0, len(self.tokens)
        for n, log_probability in enumerate(self.log_probabilities, 1):
            stable = last if n == last else tokenizer.stable_length(self.tokens[:n])
            length = len(tokenizer.decode(self.tokens[:stable]))
            end = min(length, len(self.text))  # a stop text cuts the answer
            yield self.text[start:end], log_probability
            start = end


@dataclass(frozen=True)
class Detokenizer:
    """Turns tokens into the text of an answer, which ends at the first eos or stop text."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    stops: tuple[str, ...]

    def length(self, tokens: list[int]) -> int:
        """Return the number of tokens up to eos or the token that completes a stop text, inclusive;
        len(tokens) + 1 if the answer continues.
        """
        ends = (n for n, token in enumerate(tokens, 1) if token in self.eos_ids)
        end = next(ends, len(tokens) + 1)
        if not self.stops:
            return end
        return bisect_left(range(end), True, key=lambda n: self._is_stopped(tokens[:n]))

    def lengths(self, tokens: Int[np.ndarray, "B N"]) -> Int[np.ndarray, " B"]:
        """The `length` of each row."""
        return np.array([self.length(row) for row in tokens.tolist()])

    def answer(
        self,
        tokens: Int32[np.ndarray, " N"],
        log_probabilities: Float32[np.ndarray, " N"],
        sampler: Strategy,
    ) -> Answer:
        """The answer in a row of tokens, with the score that `sampler` ranks by."""
        end = self.length(tokens.tolist())
        kept, values = tokens[:end].tolist(), log_probabilities[:end].tolist()
        penalty = sampler.length_penalty if isinstance(sampler, Beam) else 0
        text = self._cut(self.tokenizer.decode(kept))
        return Answer(text, kept, values, sum(values) / len(kept) ** penalty)

    def stream(self, chunks: Iterable[list[int]]) -> Iterator[str]:
        """The text of one answer in pieces, each as soon as no later token can change it.

        Args:
            chunks: Successive tokens. None are requested after a stop text.
        """
        tokens: list[int] = []
        sent, held_back = 0, max(map(len, self.stops), default=1) - 1
        for chunk in chunks:
            tokens += chunk
            text = self.tokenizer.decode(tokens[: self.tokenizer.stable_length(tokens)])
            if self._cut(text) != text:
                break
            end = len(text) - held_back  # what follows may be the start of a stop text
            if end > sent:
                yield text[sent:end]
                sent = end
        rest = self._cut(self.tokenizer.decode(tokens))[sent:]
        if rest:
            yield rest

    def _is_stopped(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return self._cut(text) != text

    def _cut(self, text: str) -> str:
        """The text before the first stop text."""
        places = [text.find(stop) for stop in self.stops]
        return text[: min((place for place in places if place >= 0), default=len(text))]
