"""The options of decoding, which travel from the command line to the compiled programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isfunction
from math import log
from typing import Any

import numpy as np

from paligemma_jax.inference.allowed import Allowed, describe, rows_of
from paligemma_jax.inference.sampler import is_sampler
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Strategy, is_integer
from paligemma_jax.model.edits import Change, Edits

FLOAT32_MAX = 3.4028235e38
Texts = str | Sequence[str]
Keyword = Any  # a field of `DecodingOptions`, which checks it, or `options`


@dataclass(frozen=True, eq=False)
class DecodingOptions:
    """How tokens are chosen, and when an answer ends. The seeds are separate: one per prompt.

    Args:
        max_new_tokens: Maximum length of an answer in tokens, including the end token.
        sampler: `Greedy`, `Sample`, `Beam`, `BestOf` or a `Sampler` of your own.
        min_new_tokens: Minimum number of tokens before eos.
        stop: A text or texts that end an answer. The text of the answer is what precedes the first
            of them; its tokens and score include the token that completes it, and BestOf ranks by
            that score. Beam ignores stop texts while it searches, and its answer is cut afterwards
            (transformers ends a beam there).
        allowed: What may be generated: a grammar (`Choices`, `Boxes`, `Masks`, `Json`, `Regex`),
            or a list with one per prompt; or the ids, as bool[V], or bool[B, V] with one mask per
            prompt. None allows all.
        edit: Changes of intermediate results by stage name, as in
            {"decoder/layers/3/mlp/output": Scale(0)} (`paligemma_jax.model.edits`). A function sees
            the padded prompt, [B, T, ...], and then each token, [B, 1, ...].

    Raises:
        ValueError: A value is invalid.
    """

    max_new_tokens: int = 128
    sampler: Strategy = field(default_factory=Greedy)
    min_new_tokens: int = 0
    stop: Texts | None = ()
    allowed: Allowed | None = None
    edit: Mapping[str, Change] | Edits | None = None

    def __post_init__(self):
        new, least = self.max_new_tokens, self.min_new_tokens
        if not is_integer(new) or new < 1:
            raise ValueError(f"max_new_tokens must be an integer of at least 1, got {new!r}")
        if not is_integer(least) or not 0 <= least <= new:
            raise ValueError(
                f"min_new_tokens must be an integer from 0 to max_new_tokens ({new}), got {least!r}"
            )
        if not (is_sampler(self.sampler) or isinstance(self.sampler, Beam | BestOf)):
            raise ValueError(
                "sampler must be Greedy(), Sample(...), Beam(...), BestOf(...) or an object with "
                f"init and __call__ as in pg.Sampler, got {self.sampler!r}"
            )
        if not _is_hashable(self.sampler):
            raise ValueError(
                "sampler must be hashable, a frozen dataclass of numbers, texts and tuples, "
                f"got {self.sampler!r}"
            )
        if isinstance(self.sampler, Beam):
            power, limit = self.sampler.length_penalty, log(FLOAT32_MAX) / log(max(new, 2))
            if abs(power) > limit:
                raise ValueError(
                    f"Beam.length_penalty must be from {-limit:.1f} to {limit:.1f} for answers of "
                    f"{new} tokens, or their scores overflow, got {power!r}"
                )
        is_iterable = self.stop is None or isinstance(self.stop, Iterable)
        if not is_iterable or not all(isinstance(text, str) and text for text in self.stops):
            raise ValueError(f"stop must be a non-empty text or a list of them, got {self.stop!r}")

    @classmethod
    def resolve(
        cls,
        max_new_tokens: int | None = None,
        sampler: Strategy | None = None,
        *,
        options: DecodingOptions | None = None,
        **fields: Keyword,
    ) -> DecodingOptions:
        """Build options from `options` (or the defaults) with the given fields replaced.

        A field that is None counts as not given.
        """
        fields |= dict(max_new_tokens=max_new_tokens, sampler=sampler)
        given = {name: value for name, value in fields.items() if value is not None}
        return replace(options or cls(), **given)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def copies(self) -> int:
        """Number of answers to decode per prompt, of which the best is kept."""
        return self.sampler.width if isinstance(self.sampler, Beam | BestOf) else 1

    def settings(self) -> dict[str, object]:
        """The options as JSON values, to compare two runs."""
        return dict(
            max_new_tokens=self.max_new_tokens,
            sampler=_identify(self.sampler),
            min_new_tokens=self.min_new_tokens,
            stop=list(self.stops),
            allowed=describe(self.allowed),
            **({"edit": repr(self.edit)} if self.edit else {}),
        )

    def for_rows(self, rows: np.ndarray) -> DecodingOptions:
        """The options for the prompts at the indices `rows`."""
        if self.allowed is None:
            return self
        return replace(self, allowed=rows_of(self.allowed, rows))


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _identify(value: object) -> str:
    """A text that is the same for the same sampler or function in another process."""
    if isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
