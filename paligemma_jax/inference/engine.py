"""Continuous batching: requests enter a running batch as soon as a row of it is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from paligemma_jax.grammars.automaton import Automaton
from paligemma_jax.grammars.rows import AutomatonTables
from paligemma_jax.inference.adapters import Adapters, AdapterSource
from paligemma_jax.inference.admission import Admission
from paligemma_jax.inference.allowed import compile_allowed
from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.batching import check_batch_size
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.decoding import DecodeState
from paligemma_jax.inference.generate import pad_answers, rank_answers
from paligemma_jax.inference.jobs import LIMITS, Job, Listener, Row, row_sampler
from paligemma_jax.inference.memory import check_memory
from paligemma_jax.inference.options import DecodingOptions, check_seeds
from paligemma_jax.inference.request import Request, check_top
from paligemma_jax.inference.row_allowed import row_automaton
from paligemma_jax.inference.sampling import is_integer
from paligemma_jax.inference.slots import advance, empty_state, insert
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import EncodedPrompt, Processor, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.mesh import mesh_of

# Most tokens per dispatch, the larger if no request has stops or a listener. It ends earlier when a
# row is free for a waiting request.
CHUNK, LONG_CHUNK = 8, 32


class Engine:
    """Answers requests in a batch of `rows` rows, over a cache of `slots` slots for each.

    A request takes a free row (or `copies` of them for BestOf), whatever the others are doing, and
    leaves it when its answer ends. Its tokens are those of `Predictor.answers` alone. Prompts enter
    one by one, for an eighth or a quarter of the rows, or for all; a program is compiled for each
    of these numbers, each bucket of prompt lengths and each number of images, and one for decoding.

    Args:
        rows: Number of answers that are decoded together.
        slots: Prompt, padded to a multiple of 32, and `max_new_tokens` must fit; by default the
            context.
        top_log_probabilities: As in `DecodingOptions`, for all requests.
        kept_images: Number of images whose features are kept after their last request.
        adapters: LoRA adapters of the model by name, as for `open_adapters`. Each request has one
            or none, and its answer is that of `pg.load(adapter)`.

    Raises:
        ValueError: A number is invalid, the cache does not fit the memory, or an adapter does not
            fit the model.
    """

    def __init__(
        self,
        model: PaliGemma,
        processor: Processor,
        rows: int = 16,
        slots: int = 0,
        top_log_probabilities: int = 0,
        kept_images: int = 0,
        adapters: Mapping[str, AdapterSource] = MappingProxyType({}),
    ):
        check_batch_size(model, "rows", rows)
        if not is_integer(slots) or slots < 0:
            raise ValueError(f"slots must be an integer of at least 0, got {slots!r}")
        check_top(model, top_log_probabilities)
        slots = round_up(slots or processor.context)
        check_memory(model, rows, 1, slots)
        self.model, self.processor = model, processor
        self.slots, self.top = slots, top_log_probabilities
        self.rows: list[Row | None] = [None] * rows
        self._adapters = Adapters(model, adapters)
        self._flat: Any = self._adapters.flat  # takes the place of the model in programs
        self._state: DecodeState = empty_state(self._flat, rows, slots, self.top)
        self._ended = np.ones(rows, bool)  # rows without a request, or stopped by a text
        self._steps = np.zeros(rows, np.int32)  # number of tokens of each row
        text = compile_allowed(None, model.config, processor.tokenizer, rows, 1)
        seeds, copies, least, most = np.zeros((4, rows), np.int32)
        self._request = Request(seeds, copies, text, least, most, grammar=None, top=self.top)
        self._tables = AutomatonTables(rows, model.config.decoder.vocab_size, mesh_of(self._flat))
        self._admission = Admission(self._adapters, processor, self._tables, rows, kept_images)
        self._count = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.close()

    @property
    def waiting(self) -> int:
        """Number of requests without a row."""
        return len(self._admission.waiting)

    @property
    def sizes(self) -> list[int]:
        """Numbers of prompts that enter together, the largest first."""
        return self._admission.sizes

    @property
    def occupied(self) -> int:
        """Number of rows with a request."""
        return sum(row is not None for row in self.rows)

    def submit(
        self,
        prompt: EncodedPrompt,
        options: DecodingOptions = DecodingOptions(),
        seed: int = 0,
        listener: Listener | None = None,
        adapter: str | None = None,
    ) -> int:
        """Add a request. Returns its number, with which `step` returns the answer.

        Args:
            listener: Called in `step` with the tokens of an answer, as soon as they are decoded.
            adapter: Name of one of the engine's adapters; None for the model without one.

        Raises:
            ValueError: The engine does not have the options (`sampler_of`) or the adapter, no
                allowed answer fits in `max_new_tokens`, or the request does not fit its rows or
                slots.
        """
        check_seeds([seed], 1)
        if not isinstance(prompt, EncodedPrompt):
            raise ValueError(f"prompt must be one of those of processor.encode, got {prompt!r}")
        sampler, number = row_sampler(options, self.top), self._adapters.number(adapter)
        needed = round_up(len(prompt)) + options.max_new_tokens
        if needed > self.slots or options.copies > len(self.rows):
            raise ValueError(
                f"a request of {len(prompt)} tokens and {options.max_new_tokens} new ones in "
                f"{options.copies} rows needs {needed} slots, "
                f"got an engine of {len(self.rows)} rows with {self.slots} slots"
            )
        row_automaton(options, self.model.config, self.processor.tokenizer)  # for its errors
        eos = self.model.config.eos_token_ids
        detokenizer = Detokenizer(self.processor.tokenizer, eos, options.stops)
        job = Job(self._count, prompt, options, sampler, seed, detokenizer, listener, number)
        self._count += 1
        self._admission.add(job)
        return job.number

    def cancel(self, number: int) -> None:
        """Forget a request; there is no answer to it."""
        self._admission.remove(number)
        for i, row in enumerate(self.rows):
            if row is not None and row.job.number == number:
                self._free(i)

    def step(self) -> dict[int, Answer]:
        """Let requests in, and decode some tokens. Returns the new answers by request."""
        finished: dict[int, Answer] = {}
        self._admit(finished)
        if not self.occupied:
            return finished
        rows, wanted = len(self.rows), min(self.waiting, self.sizes[1])
        enough = min(rows, rows - self.occupied + wanted) if wanted else rows
        model = self._adapters.select([row.job.adapter if row else 0 for row in self.rows])
        request = replace(self._request, grammar=self._tables.of(self._automata()))
        jobs = [row.job for row in self.rows if row]
        size = CHUNK if any(job.listener or job.options.stops for job in jobs) else LONG_CHUNK
        chosen, self._state = advance(
            model, self._state, request, self._ended, np.int32(enough), size
        )
        chosen = jax.tree.map(to_host, chosen)
        steps, done = to_host(self._state.step), to_host(self._state.done)
        counts, self._steps = steps - self._steps, np.array(steps)
        for i, row in enumerate(self.rows):
            if row is not None:
                self._add(i, row, jax.tree.map(lambda a, i=i: a[i, : counts[i]], chosen))
                if done[i] or self._ended[i]:
                    self._free(i)
                    self._finish(row, finished)
        return finished

    def answers(self) -> Iterator[dict[int, Answer]]:
        """Run until no request is left. Yields new answers by request."""
        while self.waiting or self.occupied:
            answers = self.step()
            if answers:
                yield answers

    def _admit(self, finished: dict[int, Answer]) -> None:
        """Put requests in free rows. Those whose images cannot be read are finished."""
        while True:
            free = [i for i, row in enumerate(self.rows) if row is None]
            batch = self._admission.next_batch(len(free), self._automata(), finished)
            if not batch:
                return
            self._insert(free, *self._admission.prefill(batch, self._request))

    def _insert(
        self, free: list[int], rows: list[Row], request: Request, state: DecodeState
    ) -> None:
        """Put rows in free places, as `Admission.prefill` returns them."""
        free, first = free[: len(rows)], jax.tree.map(to_host, state.chosen)
        for name in LIMITS:
            getattr(self._request, name)[free] = getattr(request, name)[: len(free)]
        places = np.full(len(first.tokens), len(self.rows))  # padding goes beyond the last row
        places[: len(free)] = free
        self._state = insert(self._flat, self._state, state, places)
        self._ended[free], self._steps[free] = False, 1
        for n, (i, row) in enumerate(zip(free, rows, strict=True)):
            self.rows[i] = row
            self._add(i, row, jax.tree.map(lambda a, n=n: a[n], first))

    def _automata(self) -> list[Automaton | None]:
        """The grammar of each row."""
        return [row and row.job.automaton for row in self.rows]

    def _add(self, place: int, row: Row, new: Chosen) -> None:
        """Add tokens to a row, and end it if they complete a stop."""
        checked, new = row.length, new.with_top(row.job.options.top_log_probabilities)
        row.parts.append(new)
        if row.job.listener and row.length > checked:
            row.job.listener(new)
        if row.job.options.stops:
            tokens = row.chosen().tokens.tolist()
            self._ended[place] = row.job.detokenizer.length(tokens, checked) <= len(tokens)

    def _free(self, place: int) -> None:
        self.rows[place] = None
        self._ended[place] = True

    def _finish(self, row: Row, finished: dict[int, Answer]) -> None:
        """Keep a complete answer; with the last of a request's copies, the request is finished."""
        job, chosen = row.job, row.chosen()
        end = job.detokenizer.length(chosen.tokens.tolist())
        job.complete[row.copy] = jax.tree.map(lambda a: a[:end], chosen)
        if len(job.complete) == job.options.copies:
            rows = [job.complete[copy] for copy in range(job.options.copies)]
            padded = pad_answers(rows, self.model.config.pad_token_id)
            generated = rank_answers(padded, job.options)
            (finished[job.number],) = job.detokenizer.answers(generated, job.options.sampler)
