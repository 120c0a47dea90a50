"""The thread that owns the engine, between requests of an event loop and steps of the engine."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread

import jax

from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.streaming import GrowingAnswer, StreamedToken
from paligemma_jax.processing.processor import EncodedPrompt
from paligemma_jax.serving.chat import Question
from paligemma_jax.serving.errors import ApiError, engine_failed, stopping

LOGGER = logging.getLogger("paligemma_jax.serving")

Event = list[StreamedToken] | Answer | ApiError  # tokens as they come; then one of the others


@dataclass(eq=False)
class Ticket:
    """One answer that the engine is making."""

    index: int  # among the answers to one question
    prompt: EncodedPrompt
    options: DecodingOptions
    seed: int
    stream: bool
    send: Callable[[int, Event], None]  # called in the worker's thread
    adapter: str | None = None
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None  # time of the first token
    number: int | None = None  # in the engine
    growing: GrowingAnswer | None = None
    ended: bool = False

    def listen(self, chosen: Chosen) -> None:
        """Take new tokens [n] of the answer."""
        if self.first is None:
            self.first = time.monotonic()
        if self.growing is None or self.ended:
            return
        steps = [jax.tree.map(lambda a, n=n: a[n], chosen) for n in range(len(chosen.tokens))]
        self.ended = any(self.growing.add(step) for step in steps)
        tokens = [] if self.ended else self.growing.settled()
        if tokens:
            self.send(self.index, tokens)

    def finish(self, answer: Answer) -> None:
        if answer.error is not None:
            self.send(self.index, ApiError(400, answer.error, "invalid_image", "messages"))
            return
        if self.growing is not None:
            self.send(self.index, self.growing.rest())
        self.send(self.index, answer)


class Worker:
    """Runs an engine in a thread of its own. Other methods are called in the event loop's.

    Args:
        make_engine: Called at once, and in the thread after an internal error.
        warm_up: Compiles the engine's programs, and yields after each.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], warm_up: Callable[[Engine], Iterable[None]]
    ):
        self.make_engine, self.warm_up = make_engine, warm_up
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[int, Ticket] = {}  # by number in the engine
        self.engine: Engine | None = make_engine()
        self.ready = self.failed = self.stopping = False
        self.thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its present step."""
        self.stopping = True
        self.commands.put(None)
        self.thread.join()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Begin answers."""
        for ticket in tickets:
            self.commands.put(lambda ticket=ticket: self._submit(ticket))

    def stream(
        self, prompt: EncodedPrompt, options: DecodingOptions, seed: int
    ) -> Iterator[list[StreamedToken]]:
        """Answer one prompt token by token, in a thread that may block. ValueError if it cannot be
        answered."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = Ticket(0, prompt, options, seed, True, lambda _, event: events.put(event))
        self.submit([ticket])
        try:
            event = events.get()
            while isinstance(event, list):
                yield event
                event = events.get()
            if isinstance(event, ApiError):
                raise ValueError(str(event))
        finally:
            self.cancel([ticket])

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Free the rows of answers that nobody waits for; finished ones are ignored."""
        self.commands.put(lambda: self._cancel(tickets))

    def fail(self, error: ApiError) -> None:
        """End all answers with an error."""
        self.commands.put(lambda: self._fail(error))

    def _submit(self, ticket: Ticket) -> None:
        if self.failed:
            ticket.send(ticket.index, engine_failed())
            return
        engine, options = self._engine, ticket.options
        tokenizer, eos_ids = engine.processor.tokenizer, engine.model.config.eos_token_ids
        detokenizer = Detokenizer(tokenizer, eos_ids, options.stops)
        ticket.growing = GrowingAnswer(detokenizer) if ticket.stream else None
        try:
            ticket.number = engine.submit(
                ticket.prompt, options, ticket.seed, ticket.listen, ticket.adapter
            )
            self.tickets[ticket.number] = ticket
        except ValueError as error:
            ticket.send(ticket.index, ApiError(400, str(error)))
        except Exception:  # a bug, which ends no other answer
            LOGGER.exception("a request failed")
            ticket.send(ticket.index, engine_failed(500))

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            number = ticket.number  # in this engine, or in one before an error
            if number is not None and self.tickets.get(number) is ticket:
                del self.tickets[number]
                self._engine.cancel(number)

    def _fail(self, error: ApiError) -> None:
        for number, ticket in self.tickets.items():
            self._engine.cancel(number)
            ticket.send(ticket.index, error)
        self.tickets.clear()

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def _run(self) -> None:
        try:
            for _ in self.warm_up(self._engine):
                if self.stopping:
                    break
            self.ready = not self.stopping
            self._serve()
        except Exception:
            LOGGER.exception("the engine cannot run")
            self.failed, self.ready = True, False
            self._fail(engine_failed())
            for command in iter(self.commands.get, None):
                command()

    def _serve(self) -> None:
        while True:
            while not self.tickets or not self.commands.empty():
                command = self.commands.get()
                if command is None:
                    self._fail(stopping())
                    self._engine.__exit__()
                    return
                command()
            try:
                for number, answer in self._engine.step().items():
                    self.tickets.pop(number).finish(answer)
            except Exception as error:
                self._restart(error)

    def _restart(self, error: Exception) -> None:
        """Answer all requests with an error, and go on with a new engine."""
        LOGGER.exception("the engine failed", exc_info=error)
        for ticket in self.tickets.values():
            ticket.send(ticket.index, engine_failed(500))
        self.tickets.clear()
        self._engine.__exit__()
        self.engine = None  # frees its cache first
        self.engine = self.make_engine()


class Answers:
    """The answers to one question, from now on: events in the order in which they happen."""

    def __init__(self, worker: Worker, question: Question, stream: bool, adapter: str | None):
        self.worker, self.loop = worker, asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tickets = [
            Ticket(n, question.prompt, question.options, seed, stream, self._send, adapter)
            for n, seed in enumerate(question.seeds)
        ]
        worker.submit(self.tickets)

    def _send(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

    def cancel(self) -> None:
        self.worker.cancel(self.tickets)
