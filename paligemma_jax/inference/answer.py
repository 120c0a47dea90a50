"""Turn generated tokens into answers: their text, end and pieces."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jaxtyping import Int

from paligemma_jax.inference.chosen import Chosen, TopTokens
from paligemma_jax.inference.request import AnswerLengths, Generated
from paligemma_jax.inference.sampling import Beam, BestOf, Strategy
from paligemma_jax.inference.stop import Stop, end_of_answer
from paligemma_jax.model.layers import FullFloat
from paligemma_jax.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt."""

    text: str
    tokens: list[int]  # up to and including eos, or the token that completes a stop text
    log_probabilities: list[float]  # of each token under the model, before any filter
    score: float  # their sum; for Beam divided by length ** length_penalty
    error: str | None = None  # why there is no answer: its image could not be read
    alternatives: tuple[Answer, ...] = ()  # the next best answers, for `num_return` above 1
    # In the place of each token, if asked for:
    top: TopTokens | None = field(default=None, compare=False)  # [N, k] most likely tokens
    logits: FullFloat[np.ndarray, "N V"] | None = field(default=None, compare=False, repr=False)

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
    """Turns tokens into the text of an answer, which ends at the first eos or stop."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    stops: tuple[Stop, ...]

    def length(self, tokens: list[int], checked: int = 0) -> int:
        """Return the number of tokens up to eos or the token that completes a stop, inclusive;
        len(tokens) + 1 if the answer continues.

        Args:
            checked: Number of tokens that are known not to complete a stop.
        """
        ends = (n for n, token in enumerate(tokens, 1) if token in self.eos_ids)
        end = next(ends, len(tokens) + 1)
        if not self.stops:
            return end
        if all(isinstance(stop, str) for stop in self.stops):
            return bisect_left(range(end), True, key=lambda n: self._end(tokens[:n]) is not None)
        stopped = (n for n in range(checked + 1, end) if self._end(tokens[:n]) is not None)
        return next(stopped, end)

    def lengths(self) -> AnswerLengths | None:
        """A function that returns the `length` of each row of a batch, which grows from call to
        call; None without stops. Each token is checked once."""
        checked, ends = 0, {}

        def lengths(tokens: Int[np.ndarray, "B N"]) -> Int[np.ndarray, " B"]:
            nonlocal checked
            for row, ids in enumerate(tokens.tolist()):
                if row not in ends:
                    length = self.length(ids, checked)
                    if length <= len(ids):
                        ends[row] = length
            checked = tokens.shape[1]
            return np.array([ends.get(row, checked + 1) for row in range(len(tokens))])

        return lengths if self.stops else None

    def answers(self, generated: Generated, strategy: Strategy) -> list[Answer]:
        """The answer to each prompt of a batch, with the score that `strategy` ranks by."""
        chosen = Chosen(
            generated.tokens, generated.log_probabilities, generated.top, generated.logits
        )
        count = strategy.num_return if isinstance(strategy, Beam | BestOf) else 1
        penalty = float(strategy.length_penalty) if isinstance(strategy, Beam) else 0.0
        answers = []
        for first in range(0, len(generated.tokens), count):
            best, *others = (
                self._answer(jax.tree.map(lambda a, row=row: a[row], chosen), penalty)
                for row in range(first, first + count)
                if row == first or generated.scores[row] > -np.inf
            )
            answers.append(replace(best, alternatives=tuple(others)))
        return answers

    def _answer(self, row: Chosen, penalty: float) -> Answer:
        end = self.length(row.tokens.tolist())
        row = jax.tree.map(lambda a: np.array(a[:end]), row)  # does not keep the batch alive
        kept, values = row.tokens.tolist(), row.log_probabilities.tolist()
        score = sum(values) / len(kept) ** penalty
        return Answer(self.cut(kept), kept, values, score, top=row.top, logits=row.logits)

    def settled(self, tokens: list[int]) -> str:
        """The text that later tokens cannot change."""
        return self.tokenizer.decode(tokens[: self.tokenizer.stable_length(tokens)])

    def is_end(self, tokens: list[int]) -> bool:
        """Whether the last token ends an answer that none before it has ended."""
        return tokens[-1] in self.eos_ids or self._end(tokens) is not None

    def _end(self, tokens: list[int]) -> int | None:
        """Length of the text before the first stop, or None."""
        text = self.tokenizer.decode(tokens)
        return end_of_answer(text, self.settled(tokens), self.stops)

    def cut(self, tokens: list[int]) -> str:
        """The text before the first stop."""
        return self.tokenizer.decode(tokens)[: self._end(tokens)]
