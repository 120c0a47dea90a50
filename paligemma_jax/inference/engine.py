"""Continuous batching: requests enter a running batch as soon as a row of it is free."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from paligemma_jax.grammars.rows import AutomatonTables
from paligemma_jax.inference.adapters import Adapters, AdapterSource
from paligemma_jax.inference.allowed import compile_allowed
from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.batching import ImageCache, check_batch_size, pad_batch
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.decoding import DecodeState, prefill
from paligemma_jax.inference.generate import pad_answers, rank_answers
from paligemma_jax.inference.jobs import LIMITS, Job, Listener, Row, row_requests, row_sampler
from paligemma_jax.inference.memory import check_memory
from paligemma_jax.inference.options import DecodingOptions, check_seeds
from paligemma_jax.inference.request import Request, check_top
from paligemma_jax.inference.row_allowed import row_automaton
from paligemma_jax.inference.row_sampling import RowParameters
from paligemma_jax.inference.sampling import is_integer
from paligemma_jax.inference.slots import SAMPLER, advance, empty_state, insert
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.processing.processor import EncodedPrompt, Processor, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.mesh import mesh_of, padded_batch_size

# Most tokens per dispatch, the larger if no request has stops or a listener. It ends earlier when a
# row is free for a waiting request.
CHUNK, LONG_CHUNK = 8, 32
AHEAD = 2  # images of so many batches are opened before their turn


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
        self.waiting: deque[Job] = deque()
        self.rows: list[Row | None] = [None] * rows
        self._adapters = Adapters(model, adapters)
        self._flat: Any = self._adapters.flat  # takes the place of the model in programs
        self._state: DecodeState = empty_state(self._flat, rows, slots, self.top)
        self._ended = np.ones(rows, bool)  # rows without a request, or stopped by a text
        self._steps = np.zeros(rows, np.int32)  # number of tokens of each row
        text = compile_allowed(None, model.config, processor.tokenizer, rows, 1)
        seeds, copies, least, most = np.zeros((4, rows), np.int32)
        self._request = Request(seeds, copies, text, least, most, grammar=None, top=self.top)
        # Numbers of prompts that enter together: few, so that few programs are compiled.
        parts = max(1, rows // 4), max(1, rows // 8), 1
        self.sizes = [rows, *(padded_batch_size(size, mesh_of(self._flat)) for size in parts)]
        self._tables = AutomatonTables(rows, model.config.decoder.vocab_size, mesh_of(self._flat))
        self._threads = ThreadPoolExecutor(4)

        def image_cache(number: int) -> ImageCache:
            model = self._adapters.select(number)
            return ImageCache(model, processor, self._threads, Counter(), kept=kept_images)

        self._images = {number: image_cache(number) for number in (0, *self._adapters.of_images)}
        self._count = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

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
        features = number if prompt.images and number in self._images else 0
        job = Job(
            self._count, prompt, options, sampler, seed, detokenizer, listener, number, features
        )
        self._count += 1
        self._images[features].add(prompt.images)
        self.waiting.append(job)
        return job.number

    def cancel(self, number: int) -> None:
        """Forget a request; there is no answer to it."""
        for job in [job for job in self.waiting if job.number == number]:
            self.waiting.remove(job)
            self._images[job.features].release(job.prompt.images)
        for i, row in enumerate(self.rows):
            if row is not None and row.job.number == number:
                self._free(i)

    def step(self) -> dict[int, Answer]:
        """Let requests in, and decode some tokens. Returns the new answers by request."""
        finished: dict[int, Answer] = {}
        batch = self._next_batch(finished)
        while batch:
            self._admit(batch)
            batch = self._next_batch(finished)
        if not self.occupied:
            return finished
        rows, wanted = len(self.rows), min(len(self.waiting), self.sizes[1])
        enough = min(rows, rows - self.occupied + wanted) if wanted else rows
        model = self._adapters.select([row.job.adapter if row else 0 for row in self.rows])
        grammar = self._tables.of([row and row.job.automaton for row in self.rows])
        request = replace(self._request, grammar=grammar)
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

    def _next_batch(self, finished: dict[int, Answer]) -> list[Job]:
        """Take requests of the first one's kind from the queue, as many as have rows. Those whose
        images cannot be read are finished."""
        while self.waiting:
            ahead = list(islice(self.waiting, (1 + AHEAD) * len(self.rows)))
            for job in ahead:
                self._images[job.features].open(job.prompt.images)
            first = ahead[0]
            room = (len(self.rows) - self.occupied) // first.options.copies
            batch = self._fitting([job for job in ahead if job.kind == first.kind][:room])
            errors = {job: self._error(job) for job in batch}
            failed = [job for job in batch if errors[job]]
            if not failed:
                size = next((size for size in self.sizes if size <= len(batch)), len(batch))
                for job in batch[:size]:
                    self.waiting.remove(job)
                return batch[:size]
            for job in failed:
                self.waiting.remove(job)
                self._images[job.features].release(job.prompt.images)
                finished[job.number] = Answer("", [], [], 0.0, error=str(errors[job]))
        return []

    def _fitting(self, batch: list[Job]) -> list[Job]:
        """The first requests of a batch, those whose grammars fit beside the ones in use."""
        used = [row.job.automaton for row in self.rows if row is not None]
        for job in batch:
            options, config = job.options, self.model.config
            job.automaton = row_automaton(options, config, self.processor.tokenizer)
        while batch and not self._tables.fit([*used, *(job.automaton for job in batch)]):
            batch = batch[:-1]
        return batch

    def _error(self, job: Job) -> ValueError | None:
        errors = map(self._images[job.features].error, job.prompt.images)
        return next((error for error in errors if error), None)

    def _admit(self, batch: list[Job]) -> None:
        """Prefill requests of one kind, and put them in free rows."""
        rows = [Row(job, copy) for job in batch for copy in range(job.options.copies)]
        free = [i for i, row in enumerate(self.rows) if row is None][: len(rows)]
        padding = [batch[0]] * (self.sizes[-1] - len(batch))  # on a mesh, a row for each device
        padded = batch + padding
        prompts = [job.prompt for job in padded]
        all_rows = [Row(job, copy) for job in padded for copy in range(job.options.copies)]
        request = row_requests(all_rows, self._request)
        grammar = self._tables.of([row.job.automaton for row in all_rows])
        for name in LIMITS:
            getattr(self._request, name)[free] = getattr(request, name)[: len(free)]
        inputs = pad_batch(self.processor, prompts)
        state = prefill(
            self._adapters.select([job.adapter for job in padded]),
            inputs,
            self._features(batch, prompts),
            replace(request, grammar=grammar),
            slots=inputs.tokens.shape[1],
            sampler=SAMPLER,
            copies=batch[0].options.copies,
            sampler_state=RowParameters.of([row.job.sampler for row in all_rows]),
        )
        first = jax.tree.map(to_host, state.chosen)
        places = np.full(len(all_rows), len(self.rows))  # padding goes beyond the last row
        places[: len(free)] = free
        self._state = insert(self._flat, self._state, state, places)
        self._ended[free], self._steps[free] = False, 1
        for n, (i, row) in enumerate(zip(free, rows, strict=True)):
            self.rows[i] = row
            self._add(i, row, jax.tree.map(lambda a, n=n: a[n], first))

    def _features(self, batch: list[Job], padded: list[EncodedPrompt]) -> Features | None:
        images = [image for prompt in padded for image in prompt.images]
        if not images:
            return None
        cache = self._images[batch[0].features]
        if not all(map(cache.is_encoded, images)):
            self._encode_ahead(batch)
        features = cache.features(images)
        cache.release([image for job in batch for image in job.prompt.images])
        return features.reshape(len(padded), -1, *features.shape[1:])

    def _encode_ahead(self, batch: list[Job]) -> None:
        """Encode the images of a batch with those of the next requests, as many as there are rows:
        the groups that enter together are small."""
        ahead = islice(self.waiting, max(0, len(self.rows) - len(batch)))
        same = [job for job in ahead if job.features == batch[0].features]
        jobs = [*batch, *(job for job in same if not self._error(job))]
        cache = self._images[batch[0].features]
        cache.encode(image for job in jobs for image in job.prompt.images)

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
