"""The web server, bound to this machine by default and restricted to the routes of the page."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_jax.demo.limits import Limits
from paligemma_jax.inference.predictor import Predictor

STYLE = Path(__file__).with_name("style.css")
# The routes that the page requests. Gradio has three times as many, for proxying, recording and
# fetching URLs.
ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static)/.*|"
    r"gradio_api/(info|queue/(join|data)|upload|upload_progress|file=(?!\w+:/).*|"
    r"heartbeat/\w+|startup-events|cancel|app_id|reset))?/?"
)
MAX_BODY = 1_000_000  # bytes of a request that is not an upload
MAX_DRAIN = 100_000_000  # bytes
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # no web fonts
MONO = ("ui-monospace", "monospace")

Message = MutableMapping[str, Any]  # Any: ASGI messages are untyped
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class RouteFilter:
    """ASGI middleware that answers 404 to other routes and 413 to long bodies."""

    app: Callable[[Message, Receive, Send], Awaitable[None]]
    limits: Limits

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if not ROUTES.fullmatch(path):
            return await _refuse(send, 404, "not found")
        limit: float = MAX_BODY
        if path.startswith("/gradio_api/upload"):
            limit += self.limits.megabytes * 1e6
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > limit:
            await _drain(receive)
            return await _refuse(send, 413, f"the limit is {self.limits.megabytes:g} MB")
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= limit else {"type": "http.disconnect"}

        await self.app(scope, receive_limited, send)


async def _drain(receive: Receive) -> None:
    """Discard the body. A client that is still sending may see a reset instead of the reply."""
    drained = 0
    while drained < MAX_DRAIN:
        message = await receive()
        drained += len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


@contextmanager
def serve(
    predictors: dict[str, Predictor],
    limits: Limits = Limits(),
    host: str = "127.0.0.1",
    port: int = 7860,
    users: int = 2,
) -> Iterator[str]:
    """Serve the page inside a `with` block and yield its address. Uploads are deleted at the end.

    Raises:
        ValueError: if the port is in use or not permitted.
    """
    with tempfile.TemporaryDirectory(prefix="paligemma-demo-") as folder:
        # Gradio reads these both when it is imported and when it runs.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from paligemma_jax.demo.page import build

        page = build(predictors, limits, users).queue(max_size=32)
        try:
            _, address, _ = page.launch(**_launch_options(limits, host, port, folder))
        except OSError:
            raise ValueError(
                f"port {port} on {host} is in use or not permitted; "
                "choose another one with --port (0 picks a free port)"
            ) from None
        try:
            yield address
        finally:
            page.close(verbose=False)


def _launch_options(limits: Limits, host: str, port: int, folder: str) -> dict[str, Any]:
    """Options of `gr.Blocks.launch`: no tunnel, no telemetry, no files but the uploads."""
    from gradio.themes import Base
    from starlette.middleware import Middleware

    theme = Base(
        primary_hue="blue", neutral_hue="slate", radius_size="lg", font=SANS, font_mono=MONO
    )
    return dict(
        server_name=host,
        server_port=port or _free_port(host),
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        allowed_paths=[folder],
        max_file_size=int(limits.megabytes * 1e6),
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(RouteFilter, limits=limits)]},
    )


def _free_port(host: str) -> int:
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]
