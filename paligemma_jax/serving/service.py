"""What a server offers, its limits, and the state that its requests share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from paligemma_jax.inference.adapters import AdapterSource
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.memory import cache_bytes
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.processing.processor import round_up
from paligemma_jax.retrieval.retriever import Retriever
from paligemma_jax.serving.errors import ApiError, engine_failed, stopping
from paligemma_jax.serving.hosts import Hosts
from paligemma_jax.serving.limits import ChatLimits, EngineShape, PictureLimits, ServingLimits
from paligemma_jax.serving.measures import Measures
from paligemma_jax.serving.worker import Worker

PROMPT_ROOM = 256  # tokens of text beside a picture, by default
WARM_TEXTS = (8, 40)  # tokens of the prompts that are compiled for before the first request


@dataclass
class Budget:
    """The bytes of open requests."""

    limit: float
    used: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def reserve(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes until the `with` block ends. It raises ApiError if
        there is no room."""
        own = 0

        def count(size: int) -> None:
            nonlocal own
            with self.lock:
                if self.used + size > self.limit:
                    raise ApiError(429, "too many requests are open: try again later", "overloaded")
                self.used, own = self.used + size, own + size

        try:
            yield count
        finally:
            with self.lock:
                self.used -= own


@dataclass
class Service:
    """A model behind the API."""

    predictor: Predictor
    name: str
    hosts: Hosts
    shape: EngineShape = field(default_factory=EngineShape)
    limits: ServingLimits = field(default_factory=ServingLimits)
    chat: ChatLimits = field(default_factory=ChatLimits)
    pictures: PictureLimits = field(default_factory=PictureLimits)
    keys: frozenset[str] = frozenset()  # none: everyone may use it
    allow_urls: bool = False
    top: int = 0  # most likely tokens that can be asked for
    adapters: Mapping[str, AdapterSource] = field(default_factory=dict)  # models on the same base
    retriever: Retriever | None = None
    retriever_name: str = ""
    draining: bool = False
    open: int = 0  # answers that are not complete

    def __post_init__(self):
        if self.name in self.adapters:
            raise ValueError(f"adapters must not have the name of the model, got {self.name!r}")
        self.created = int(time.time())
        # Threads of their own for what may wait for other servers, or for each other.
        self.readers = ThreadPoolExecutor(32, "reader")
        self.embedders = ThreadPoolExecutor(8, "embeddings")
        self.budget = Budget(self.limits.total_megabytes * 1e6)
        self.measures = Measures()
        self.worker = Worker(self._make_engine, warm_up)
        engine = self.worker.engine
        self.rows, self.slots = (len(engine.rows), engine.slots) if engine else (0, 0)
        self.measures.watch("rows", "Rows of the running batch.", lambda: self.rows)
        self.measures.watch("rows_occupied", "Rows with a request.", self._occupied)
        self.measures.watch("answers_waiting", "Answers without a row.", self._waiting)

    def _make_engine(self) -> Engine:
        return make_engine(
            self.predictor, self.shape, self.chat.new_tokens, self.top, self.adapters
        )

    def _occupied(self) -> int:
        engine = self.worker.engine
        return 0 if engine is None else engine.occupied

    def _waiting(self) -> int:
        return max(self.open - self._occupied(), 0)

    @property
    def names(self) -> list[str]:
        """The models that answer chats."""
        return [self.name, *self.adapters]

    @contextmanager
    def counted(self, answers: int) -> Iterator[None]:
        """Count answers as open inside a `with` block."""
        self.open += answers
        try:
            yield
        finally:
            self.open -= answers

    def check_open(self) -> None:
        """Raise ApiError if the server does not take requests."""
        if self.draining:
            raise stopping()
        if self.worker.failed:
            raise engine_failed()
        if not self.worker.ready:
            raise ApiError(503, "the model is being compiled: try again later", "starting")

    def check_queue(self, answers: int = 1) -> None:
        """Raise ApiError if so many more answers would have to wait too long."""
        if self.open + answers > self.rows + self.limits.queue:
            raise ApiError(
                429, f"{self._waiting()} answers are waiting: try again later", "overloaded"
            )

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True


def make_engine(
    predictor: Predictor,
    shape: EngineShape,
    new_tokens: int,
    top: int,
    adapters: Mapping[str, AdapterSource] = MappingProxyType({}),
) -> Engine:
    """An engine of a shape. ValueError if it is invalid or does not fit the memory."""
    processor = predictor.processor
    room = processor.image_tokens + PROMPT_ROOM + new_tokens
    wanted = shape.slots or min(room, processor.context)
    slots = round_up(wanted)
    least = round_up(processor.image_tokens + max(WARM_TEXTS)) + 2
    if slots < least:
        raise ValueError(
            f"--slots must be at least {least}, for a picture, a short prompt and an answer, "
            f"got {wanted}"
        )
    rows = shape.rows
    if shape.cache_gib:
        rows = int(shape.cache_gib * 2**30 / cache_bytes(predictor.model, slots))
    if rows < 1:
        raise ValueError(
            f"the cache must have room for a row of {slots} tokens, which takes "
            f"{cache_bytes(predictor.model, slots) / 2**30:.2g} GiB, got {shape.cache_gib} GiB"
        )
    return Engine(predictor.model, processor, rows, slots, top, shape.kept_images, adapters)


def warm_up(engine: Engine) -> Iterator[None]:
    """Compile the programs of short prompts about one picture. Yields after each."""
    from PIL import Image

    processor, picture = engine.processor, Image.new("RGB", (8, 8))
    options = DecodingOptions(max_new_tokens=2)
    for tokens in WARM_TEXTS:
        (prompt,) = processor.encode([picture], "a " * (tokens // 2))
        for size in sorted({*engine.sizes}, reverse=True):
            for _ in range(size):
                engine.submit(prompt, options)
            for _ in engine.answers():
                pass
            yield
