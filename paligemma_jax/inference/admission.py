"""The way into an engine's batch: a queue of requests, and the prefill of those that have rows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from paligemma_jax.grammars.automaton import Automaton
from paligemma_jax.grammars.rows import AutomatonTables
from paligemma_jax.inference.adapters import Adapters
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.batching import ImageCache, pad_batch
from paligemma_jax.inference.decoding import DecodeState, prefill
from paligemma_jax.inference.jobs import Job, Row, row_requests
from paligemma_jax.inference.request import Request
from paligemma_jax.inference.row_allowed import row_automaton
from paligemma_jax.inference.row_sampling import RowParameters
from paligemma_jax.inference.slots import SAMPLER
from paligemma_jax.model.paligemma import Features
from paligemma_jax.processing.processor import EncodedPrompt, Processor
from paligemma_jax.sharding.mesh import mesh_of, padded_batch_size

AHEAD = 2  # images of so many batches are opened before their turn


class Admission:
    """The requests that wait for rows of an engine.

    Requests of one kind enter together, in groups of few sizes, so that few programs are compiled:
    one, an eighth or a quarter of the rows, or all. Threads open the images of the next requests.

    Args:
        adapters: The model with its adapters.
        tables: The grammars of the rows in use; those of new requests must fit beside them.
        rows: Number of rows of the engine.
        kept_images: As for `Engine`.
    """

    def __init__(
        self,
        adapters: Adapters,
        processor: Processor,
        tables: AutomatonTables,
        rows: int,
        kept_images: int,
    ):
        self.adapters, self.processor = adapters, processor
        self.tables, self.rows = tables, rows
        self.waiting: deque[Job] = deque()
        self.threads = ThreadPoolExecutor(4)
        mesh = mesh_of(adapters.flat)
        parts = max(1, rows // 4), max(1, rows // 8), 1
        self.sizes = [rows, *(padded_batch_size(size, mesh) for size in parts)]

        def image_cache(number: int) -> ImageCache:
            model = adapters.select(number)
            return ImageCache(model, processor, self.threads, Counter(), kept=kept_images)

        # By the number of the adapter that encodes them.
        self.images = {number: image_cache(number) for number in (0, *adapters.of_images)}

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)

    def add(self, job: Job) -> None:
        """Add a request at the end of the queue."""
        if job.prompt.images and job.adapter in self.images:
            job.features = job.adapter
        self.images[job.features].add(job.prompt.images)
        self.waiting.append(job)

    def remove(self, number: int) -> None:
        """Forget a request, if it waits."""
        for job in [job for job in self.waiting if job.number == number]:
            self.waiting.remove(job)
            self.images[job.features].release(job.prompt.images)

    def next_batch(
        self, free: int, used: Sequence[Automaton | None], finished: dict[int, Answer]
    ) -> list[Job]:
        """Take requests of the first one's kind from the queue, as many as have rows.

        Args:
            free: Number of rows without a request.
            used: The grammars of the other rows.
            finished: Gets the answers to requests whose images cannot be read: their errors.
        """
        while self.waiting:
            ahead = list(islice(self.waiting, (1 + AHEAD) * self.rows))
            for job in ahead:
                self.images[job.features].open(job.prompt.images)
            first = ahead[0]
            room = free // first.options.copies
            batch = self._fitting([job for job in ahead if job.kind == first.kind][:room], used)
            errors = {job: self._error(job) for job in batch}
            failed = [job for job in batch if errors[job]]
            if not failed:
                size = next((size for size in self.sizes if size <= len(batch)), len(batch))
                for job in batch[:size]:
                    self.waiting.remove(job)
                return batch[:size]
            for job in failed:
                self.remove(job.number)
                finished[job.number] = Answer("", [], [], 0.0, error=str(errors[job]))
        return []

    def prefill(self, batch: list[Job], like: Request) -> tuple[list[Row], Request, DecodeState]:
        """Compute the first tokens of requests of one kind.

        Args:
            batch: As `next_batch` returns it.
            like: A request of the engine.

        Returns:
            The rows, `copies` for each request; and, with padding rows after them, their limits and
            their state.
        """
        padding = [batch[0]] * (self.sizes[-1] - len(batch))  # on a mesh, a row for each device
        jobs, copies = batch + padding, batch[0].options.copies
        prompts = [job.prompt for job in jobs]
        rows = [Row(job, copy) for job in jobs for copy in range(copies)]
        request = row_requests(rows, like)
        grammar = self.tables.of([row.job.automaton for row in rows])
        inputs = pad_batch(self.processor, prompts)
        state = prefill(
            self.adapters.select([job.adapter for job in jobs]),
            inputs,
            self._features(batch, prompts),
            replace(request, grammar=grammar),
            slots=inputs.tokens.shape[1],
            sampler=SAMPLER,
            copies=copies,
            sampler_state=RowParameters.of([row.job.sampler for row in rows]),
        )
        return rows[: len(batch) * copies], request, state

    def _fitting(self, batch: list[Job], used: Sequence[Automaton | None]) -> list[Job]:
        """The first requests of a batch, those whose grammars fit beside the ones in use."""
        config, tokenizer = self.adapters.config, self.processor.tokenizer
        for job in batch:
            job.automaton = row_automaton(job.options, config, tokenizer)
        while batch and not self.tables.fit([*used, *(job.automaton for job in batch)]):
            batch = batch[:-1]
        return batch

    def _error(self, job: Job) -> ValueError | None:
        errors = map(self.images[job.features].error, job.prompt.images)
        return next((error for error in errors if error), None)

    def _features(self, batch: list[Job], padded: list[EncodedPrompt]) -> Features | None:
        images = [image for prompt in padded for image in prompt.images]
        if not images:
            return None
        cache = self.images[batch[0].features]
        if not all(map(cache.is_encoded, images)):
            self._encode_ahead(batch)
        features = cache.features(images)
        cache.release([image for job in batch for image in job.prompt.images])
        return features.reshape(len(padded), -1, *features.shape[1:])

    def _encode_ahead(self, batch: list[Job]) -> None:
        """Encode the images of a batch with those of the next requests, as many as there are rows:
        the groups that enter together are small."""
        ahead = islice(self.waiting, max(0, self.rows - len(batch)))
        same = [job for job in ahead if job.features == batch[0].features]
        jobs = [*batch, *(job for job in same if not self._error(job))]
        cache = self.images[batch[0].features]
        cache.encode(image for job in jobs for image in job.prompt.images)
