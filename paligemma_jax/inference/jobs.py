"""The requests of an engine, and the rows of its batch that answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from paligemma_jax.grammars.automaton import Automaton
from paligemma_jax.inference.answer import Detokenizer
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.request import Request
from paligemma_jax.inference.row_allowed import has_automaton
from paligemma_jax.inference.row_sampling import supports
from paligemma_jax.inference.sampler import Sampler
from paligemma_jax.inference.sampling import BestOf
from paligemma_jax.processing.processor import EncodedPrompt, round_up

LIMITS = "seeds", "copies", "min_new_tokens", "max_new_tokens"  # of `Request`, one for each row

Listener = Callable[[Chosen], None]  # gets the new tokens [n] of an answer


def sampler_of(options: DecodingOptions) -> Sampler | None:
    """The sampler of each row; None for options that an engine does not have: a sampler other than
    Greedy, Sample and BestOf of them, a repetition penalty, `Json` and `Regex`, `edit` and
    `logits`."""
    strategy = options.sampler
    sampler = strategy.sampler if isinstance(strategy, BestOf) else strategy
    others = options.edit or options.logits or not has_automaton(options.allowed)
    return None if others or not supports(sampler) else sampler  # type: ignore[return-value]


def row_sampler(options: DecodingOptions, top: int) -> Sampler:
    """The sampler of each row. ValueError if an engine with `top` most likely tokens does not have
    the options."""
    sampler = sampler_of(options)
    if sampler is None:
        raise ValueError(
            "an engine has the samplers Greedy, Sample without a penalty and BestOf, and no Json, "
            f"Regex, edit or logits, got {options}"
        )
    if options.top_log_probabilities > top:
        raise ValueError(
            f"top_log_probabilities must be at most {top}, as given to the engine, "
            f"got {options.top_log_probabilities}"
        )
    return sampler


@dataclass(eq=False)
class Job:
    """A request from its arrival to its answer."""

    number: int
    prompt: EncodedPrompt
    options: DecodingOptions
    sampler: Sampler
    seed: int
    detokenizer: Detokenizer
    listener: Listener | None
    adapter: int = 0  # its number
    features: int = 0  # the number of the adapter that encodes the images
    automaton: Automaton | None = None  # of the answer, from when the request may get a row
    complete: dict[int, Chosen] = field(default_factory=dict)  # answers by copy, [n] tokens each

    @property
    def kind(self) -> tuple[int, ...]:
        """Jobs of one kind can be prefilled together: length, images and their encoder, copies."""
        length, images = round_up(len(self.prompt)), len(self.prompt.images)
        return length, images, self.features, self.options.copies


@dataclass(eq=False)
class Row:
    """One row of the running batch."""

    job: Job
    copy: int
    parts: list[Chosen] = field(default_factory=list)  # [n] tokens each

    @property
    def length(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    def chosen(self) -> Chosen:
        """All tokens so far."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *self.parts)


def row_requests(rows: Sequence[Row], like: Request) -> Request:
    """The limits and seeds of rows."""

    def column(values: Iterable[int]) -> np.ndarray:
        return np.fromiter(values, np.int32, len(rows))

    return replace(
        like,
        seeds=column(row.job.seed for row in rows),
        copies=column(row.copy for row in rows),
        min_new_tokens=column(row.job.options.min_new_tokens for row in rows),
        max_new_tokens=column(row.job.options.max_new_tokens for row in rows),
    )
