"""An answer as a stream of tokens, each with its text as soon as no later token can change it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float32

from paligemma_jax.inference.answer import Detokenizer
from paligemma_jax.inference.chosen import Chosen, TopTokens


@dataclass(frozen=True)
class StreamedToken:
    """One token of an answer. The texts of all tokens join to the answer's."""

    id: int
    text: str  # a character that takes several tokens belongs to the last one
    log_probability: float  # under the model, before any filter
    top: TopTokens | None = field(default=None, compare=False)  # [k], if asked for
    logits: Float32[np.ndarray, " V"] | None = field(default=None, compare=False, repr=False)


def stream_tokens(
    detokenizer: Detokenizer, chunks: Iterable[Chosen]
) -> Iterator[list[StreamedToken]]:
    """Stream the tokens of one answer.

    Args:
        chunks: Successive tokens of one row, [1, N]. None are requested after the end.

    Yields:
        The tokens that each chunk settles.
    """
    growing = GrowingAnswer(detokenizer)
    for chunk in chunks:
        steps = (jax.tree.map(lambda a, n=n: a[0, n], chunk) for n in range(chunk.tokens.shape[1]))
        if any(growing.add(step) for step in steps):
            break
        yield growing.settled()
    yield growing.rest()


@dataclass
class GrowingAnswer:
    """An answer that gets its tokens one by one."""

    detokenizer: Detokenizer
    tokens: list[int] = field(default_factory=list)
    steps: list[Chosen] = field(default_factory=list)  # of each token
    ends: list[int] = field(default_factory=lambda: [0])  # length of the text before each token
    sent: int = 0  # number of tokens

    def add(self, step: Chosen) -> bool:
        """Add a token. Returns whether it ends the answer."""
        self.tokens.append(int(step.tokens))
        self.steps.append(step)
        self.ends.append(len(self.detokenizer.settled(self.tokens)))
        return self.detokenizer.is_end(self.tokens)

    def settled(self) -> list[StreamedToken]:
        """New tokens whose text cannot change, nor be the start of a stop text."""
        texts = [stop for stop in self.detokenizer.stops if isinstance(stop, str)]
        held_back = max(map(len, texts), default=1) - 1
        last = bisect_right(self.ends, self.ends[-1] - held_back) - 1
        last = min(last, self.detokenizer.tokenizer.stable_length(self.tokens))
        return self._take(last, self.detokenizer.settled(self.tokens))

    def rest(self) -> list[StreamedToken]:
        """The remaining tokens."""
        text = self.detokenizer.cut(self.tokens)
        self.ends[-1] = len(text)
        return self._take(len(self.tokens), text)

    def _take(self, last: int, text: str) -> list[StreamedToken]:
        places, self.sent = range(self.sent, last), max(self.sent, last)
        return [
            StreamedToken(
                self.tokens[n],
                text[self.ends[n] : self.ends[n + 1]],
                float(self.steps[n].log_probabilities),
                self.steps[n].top,
                self.steps[n].logits,
            )
            for n in places
        ]
