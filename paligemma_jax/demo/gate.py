"""What may reach Gradio: an ASGI middleware in front of the page.

It relies on Gradio's protocol only: the routes that the page requests, that an upload is answered
with the paths of its files, and that a file in a request is an object with a `path`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

from convert.typed_json import decode
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.uploads import Uploads
from paligemma_jax.serving.asgi import (
    App,
    Body,
    Message,
    Receive,
    Refusal,
    Send,
    replay,
    too_large,
    with_headers,
)
from paligemma_jax.serving.hosts import Hosts

# The routes that the page requests. Gradio has three times as many, for proxying, recording and
# fetching URLs.
ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static)/.*|"
    r"gradio_api/(info|queue/(join|data)|upload|upload_progress|file=(?!\w+:/).*|"
    r"heartbeat/\w+|startup-events|cancel|app_id|reset))?/?"
)
UPLOAD, FILE = "/gradio_api/upload", "/gradio_api/file="
MAX_BODY = 1_000_000  # bytes of a request besides the pictures
# The page shows the pictures of visitors as images only. Opened by itself, a file is downloaded,
# and nothing in it runs.
FILE_HEADERS = {
    b"content-disposition": b"attachment",
    b"content-security-policy": b"sandbox; default-src 'none'",
    b"x-content-type-options": b"nosniff",
}
# Everything else may load from this server only, whatever Gradio's page asks for.
PAGE_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


@dataclass(frozen=True)
class Gate:
    """Refuses hosts, routes, bodies and paths, and bounds the uploads."""

    app: App
    limits: Limits
    hosts: Hosts
    uploads: Uploads
    many: bool = False
    """Whether one upload may have several pictures, up to the space of a visitor."""

    @property
    def max_upload(self) -> float:
        """The limit on the bytes of an upload."""
        limits = self.limits
        return 1e6 * (limits.visitor_megabytes if self.many else limits.megabytes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page uses none
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            body = Body(receive)
            try:
                await self._admit(scope, body, send)
            except Refusal as refusal:
                await body.drain()
                await refusal.reply(send)
        else:
            await self.app(scope, receive, send)

    async def _admit(self, scope: Message, body: Body, send: Send) -> None:
        path = scope["path"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        self.hosts.check(headers.get(b"host", ""))
        if not ROUTES.fullmatch(path):
            raise Refusal(HTTPStatus.NOT_FOUND, "not found")
        is_upload = path.rstrip("/") == UPLOAD
        body.limit = MAX_BODY + (self.max_upload if is_upload else 0)
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length must be a number of bytes")
        if int(length) > body.limit:
            raise too_large(body.limit)
        if not path.startswith(FILE):
            send = with_headers(send, {b"content-security-policy": PAGE_POLICY})
        if is_upload:
            await self._upload(scope, body, send, int(length))
        elif path.startswith(FILE):
            await self.app(scope, body, with_headers(send, FILE_HEADERS))
        elif scope["method"] == "POST":
            content = await body.read()
            self._check_paths(content)
            await self.app(scope, replay(content, body), send)
        else:
            await self.app(scope, body, send)

    def _check_paths(self, content: bytes) -> None:
        """Refuse files that were not uploaded, such as URLs, which Gradio would fetch."""
        for path in _paths(content):
            if not self.uploads.contains(path):
                reason = "a picture must be an upload, not a URL or another file"
                raise Refusal(HTTPStatus.BAD_REQUEST, reason)
            self.uploads.touch(path)
        self.uploads.delete_oldest()

    async def _upload(self, scope: Message, body: Body, send: Send, length: int) -> None:
        """Pass on an upload, if there is space for it, and record its files."""
        visitor, answer = scope["client"][0], bytearray()
        size = min(length or body.limit, self.max_upload)
        if not self.uploads.begin(visitor, int(size)):
            reason = "too many uploads at once: try again later"
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, reason)

        async def record(message: Message) -> None:
            answer.extend(message.get("body", b""))
            await send(message)

        paths: list[str] = []
        try:
            await self.app(scope, body, record)
            paths = decode(bytes(answer), list[str])
        except ValueError:  # refused by Gradio
            pass
        finally:
            self.uploads.end(visitor, int(size), paths)


def _paths(content: bytes) -> Iterator[str]:
    """The `path` of every object in a JSON body."""
    try:
        values = [decode(content, object)] if content else []
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is {error}") from None
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield str(value["path"])
            values += value.values()
        elif isinstance(value, list):
            values += value
