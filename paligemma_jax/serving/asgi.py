"""Read the bodies of requests, refuse requests, and change the headers of replies (ASGI)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]  # Any: ASGI messages are untyped
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_DRAIN = 100_000_000  # bytes


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status

    async def reply(self, send: Send) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        status = self.status.value
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": str(self).encode()})


def too_large(limit: float) -> Refusal:
    return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the limit is {limit / 1e6:g} MB")


class Body:
    """The body of a request: an ASGI `receive` that counts."""

    def __init__(self, receive: Receive, limit: float = float("inf")):
        self.receive, self.limit = receive, limit
        self.received, self.complete = 0, False

    async def __call__(self) -> Message:
        """Return the next message. Beyond the limit, the visitor seems to have left."""
        message = await self.receive()
        self.received += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return message if self.received <= self.limit else {"type": "http.disconnect"}

    async def read(self, count: Callable[[int], None] = lambda _: None) -> bytes:
        """Return the complete body. Raises Refusal if it is beyond the limit.

        Args:
            count: Called with the bytes of each part.
        """
        content = bytearray()
        while not self.complete:
            part = (await self()).get("body", b"")
            if self.received > self.limit:
                raise too_large(self.limit)
            count(len(part))
            content += part
        return bytes(content)

    async def drain(self) -> None:
        """Discard the rest. A client that is still sending may see a reset instead of a reply."""
        self.limit = float("inf")
        while not self.complete and self.received < MAX_DRAIN:
            await self()


def replay(content: bytes, receive: Receive) -> Receive:
    """A body that was read already, and what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def with_headers(send: Send, headers: dict[bytes, bytes]) -> Send:
    """Send `headers` in place of those of the same names."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [pair for pair in message["headers"] if pair[0].lower() not in headers]
            message["headers"] = [*others, *headers.items()]
        await send(message)

    return send_with_headers
