"""HTTP/1.1 of one connection: uvicorn's, with limits for clients that do nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from paligemma_jax.serving.errors import ApiError

WATCH_SECONDS = 30.0  # a client that does nothing is closed after one to two times this
SPARE_FILES = 200  # file descriptors that are not for connections
LOGGER = logging.getLogger("paligemma_jax.serving")


class Protocol(H11Protocol):
    """A connection, closed when its client sends no complete request, or does not read the reply.

    uvicorn has a limit for idle connections only, and only after their first request.
    """

    _watch: asyncio.TimerHandle | None = None
    _progress: tuple[object, int] | None = None  # at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            LOGGER.warning("too many connections: one more was closed")
            transport.abort()
            return
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of the other errors."""
        status = HTTPStatus.BAD_REQUEST
        body = json.dumps(ApiError(status, "the request must be valid HTTP/1.1").body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        try:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # a reply has begun already
            LOGGER.info("a request ended with invalid HTTP")
        self.transport.close()

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(WATCH_SECONDS, self._look)

    def _look(self) -> None:
        """Close the connection if its client was to act since the last look, and did not."""
        unsent = self.transport.get_write_buffer_size()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        progress = (self.cycle, unsent)
        if progress == self._progress and not (is_answering and not unsent):
            self.transport.abort()
            return
        self._progress = progress
        self._look_later()


def max_connections() -> int:
    """The number of connections that leave the process some of its file descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return 400
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 100_000 if soft == resource.RLIM_INFINITY else max(soft - SPARE_FILES, soft // 2)
