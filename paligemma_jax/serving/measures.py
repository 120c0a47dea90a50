"""What the server counts and measures, in the format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from paligemma_jax.inference.answer import Answer
from paligemma_jax.serving.worker import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
PREFIX = "paligemma_"


class Measures:
    """Counters, gauges and histograms of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests.", ["route", "status"])
        self.tokens = self._counter("tokens", "Tokens of prompts and answers.", ["kind"])
        self.first_token = self._histogram("first_token", "Time to the first token.", SECONDS)
        self.per_token = self._histogram(
            "per_token", "Time for each token after the first.", TOKEN_SECONDS
        )
        self.duration = self._histogram("answer", "Time to the complete answer.", SECONDS)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        name = f"{PREFIX}{name}_seconds"
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when the metrics are."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(value)

    def add(self, ticket: Ticket, answer: Answer) -> None:
        """Count a complete answer."""
        now, count = time.monotonic(), len(answer.tokens)
        first = now if ticket.first is None else ticket.first
        self.tokens.labels("prompt").inc(len(ticket.prompt))
        self.tokens.labels("answer").inc(count)
        self.first_token.observe(first - ticket.arrived)
        self.duration.observe(now - ticket.arrived)
        if count > 1:
            self.per_token.observe((now - first) / (count - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
