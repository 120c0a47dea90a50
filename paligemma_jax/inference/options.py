"""The options of decoding, which travel from the command line to the compiled programs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isfunction
from math import log
from typing import Any

import numpy as np
from jaxtyping import Int

from paligemma_jax.inference.allowed import Allowed, describe, rows_of
from paligemma_jax.inference.sampler import is_sampler
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Strategy, is_integer
from paligemma_jax.inference.stop import Stop, Stops, as_stops
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
        stop: Texts or functions that end an answer, one or a list. The text of the answer is what
            precedes the first stop text; its tokens and score include the token that completes it,
            and BestOf ranks by that score. A function is called with the text after each token, of
            complete characters, and returns whether the answer ends with it (or the length of the
            text to keep of it); it may be called more than once for a text. Beam ignores stops
            while it searches, and its answer is cut afterwards (transformers ends a beam there).
        allowed: What may be generated: a grammar (`Choices`, `Boxes`, `Masks`, `Json`, `Regex`),
            or a list with one per prompt; or the ids, as bool[V], or bool[B, V] with one mask per
            prompt. None allows all.
        edit: Changes of intermediate results by stage name, as in
            {"decoder/layers/3/mlp/output": Scale(0)} (`paligemma_jax.model.edits`). A function sees
            the padded prompt, [B, T, ...], and then each token, [B, 1, ...].
        top_log_probabilities: Number of most likely tokens to return with their log-probabilities
            for each token of an answer, as `Answer.top`.
        logits: Whether to return the logits of the model for each token, as `Answer.logits`. Not
            for Beam.

    Raises:
        ValueError: A value is invalid.
    """

    max_new_tokens: int = 128
    sampler: Strategy = field(default_factory=Greedy)
    min_new_tokens: int = 0
    stop: Stops | None = ()
    allowed: Allowed | None = None
    edit: Mapping[str, Change] | Edits | None = None
    top_log_probabilities: int = 0
    logits: bool = False

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
        top, logits = self.top_log_probabilities, self.logits
        if not is_integer(top) or top < 0:
            raise ValueError(f"top_log_probabilities must be an integer of at least 0, got {top!r}")
        if not isinstance(logits, bool):
            raise ValueError(f"logits must be True or False, got {logits!r}")
        if logits and isinstance(self.sampler, Beam):
            raise ValueError(
                "logits must be False with Beam, which would keep those of all beams: use "
                "top_log_probabilities, or predictor.logits for the answer"
            )
        if isinstance(self.sampler, Beam):
            power, limit = self.sampler.length_penalty, log(FLOAT32_MAX) / log(max(new, 2))
            if abs(power) > limit:
                raise ValueError(
                    f"Beam.length_penalty must be from {-limit:.1f} to {limit:.1f} for answers of "
                    f"{new} tokens, or their scores overflow, got {power!r}"
                )
        as_stops(self.stop)

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
    def stops(self) -> tuple[Stop, ...]:
        """The stop texts and functions as a tuple."""
        return as_stops(self.stop)

    @property
    def copies(self) -> int:
        """Number of answers to decode per prompt, of which the best is kept."""
        return self.sampler.width if isinstance(self.sampler, Beam | BestOf) else 1

    @property
    def num_return(self) -> int:
        """Number of answers to return per prompt."""
        return self.sampler.num_return if isinstance(self.sampler, Beam | BestOf) else 1

    def settings(self) -> dict[str, object]:
        """The options as JSON values, to compare two runs.

        Options of later versions are left out at their defaults, so that older runs resume.
        """
        later = dict(
            edit=repr(self.edit) if self.edit else None,
            top_log_probabilities=self.top_log_probabilities,
            logits=self.logits,
        )
        return dict(
            max_new_tokens=self.max_new_tokens,
            sampler=_identify(self.sampler),
            min_new_tokens=self.min_new_tokens,
            stop=[stop if isinstance(stop, str) else _identify(stop) for stop in self.stops],
            allowed=describe(self.allowed),
            **{name: value for name, value in later.items() if value},
        )

    def for_rows(self, rows: np.ndarray) -> DecodingOptions:
        """The options for the prompts at the indices `rows`."""
        if self.allowed is None:
            return self
        return replace(self, allowed=rows_of(self.allowed, rows))


def check_seeds(seeds: Sequence[int] | None, prompts: int) -> Int[np.ndarray, " B"]:
    """Return the seeds of B prompts as an array; by default 0, 1, 2, ...

    Raises:
        ValueError: They are not B 32-bit integers.
    """
    if seeds is None:
        return np.arange(prompts)
    if np.ndim(seeds) != 1:
        raise ValueError(f"seeds must be a list with one integer per prompt, got {seeds!r}")
    if len(seeds) != prompts:
        raise ValueError(f"seeds must be one per prompt, got {len(seeds)} for {prompts} prompts")
    for seed in seeds:
        if not is_integer(seed) or not -(2**31) <= seed < 2**31:
            raise ValueError(f"seeds must be 32-bit integers, got {seed!r}")
    return np.asarray(seeds)


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
    return re.sub(r" at 0x[0-9a-f]+|, num_return=1\b", "", repr(value))  # as before num_return
