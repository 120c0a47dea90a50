"""The page on a port: to this machine alone unless told otherwise, with a fence around Gradio's many routes and a folder of its own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_jax.demo.limits import Limits
from paligemma_jax.inference.predictor import Predictor

STYLE = Path(__file__).with_name("style.css")
ROUTES = re.compile(  # what the page itself asks for; Gradio has three times as many, to edit, proxy, record, fetch addresses, ...
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static)/.*|"
    r"gradio_api/(info|queue/(join|data)|upload|upload_progress|file=(?!\w+:/).*|heartbeat/\w+|startup-events|cancel|app_id|reset))?/?"
)
SENTENCE = 1_000_000  # bytes of a request that uploads nothing


@dataclass
class Fence:
    """ASGI: answers 404 to any other route, and 413 to a body that is too long, none of which is kept."""

    app: Callable[..., Awaitable[None]]
    limits: Limits

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if not ROUTES.fullmatch(path):
            return await _refuse(send, 404, "no such page")
        room = self.limits.megabytes * 1e6 + SENTENCE if path.startswith("/gradio_api/upload") else SENTENCE
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > room:
            await _drain(receive)
            return await _refuse(send, 413, f"a file may have {self.limits.megabytes:g} MB")
        taken = 0

        async def counted() -> dict:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= room else {"type": "http.disconnect"}

        await self.app(scope, counted, send)


async def _drain(receive: Callable, most: int = 100_000_000) -> None:
    """Lets the body go by: who is answered before all is sent may find the connection reset in the place of the answer."""
    message: dict = {"more_body": True}
    while message.get("more_body") and most > 0:
        message = await receive()
        most -= len(message.get("body", b""))


async def _refuse(send: Callable, status: int, reason: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": reason.encode()})


@contextmanager
def served(predictors: dict[str, Predictor], limits: Limits = Limits(), host: str = "127.0.0.1", port: int = 7860, users: int = 2):
    """Serves while the block runs and yields the address; its folder of uploads goes with it. ValueError if the port is taken."""
    with tempfile.TemporaryDirectory(prefix="paligemma-demo-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # read by Gradio when it is imported and when it runs
        page = _page(predictors, limits, users)
        try:
            _, address, _ = page.launch(**_options(limits, host, port, folder))
        except OSError:
            raise ValueError(f"port {port} of {host} is taken or not allowed: choose another with --port (0 takes any that is free)") from None
        try:
            yield address
        finally:
            page.close(verbose=False)


def _page(predictors: dict[str, Predictor], limits: Limits, users: int) -> Any:
    from paligemma_jax.demo.page import build

    return build(predictors, limits, users).queue(max_size=32)


def _options(limits: Limits, host: str, port: int, folder: str) -> dict[str, Any]:
    from gradio.themes import Base
    from starlette.middleware import Middleware

    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # fonts of the reader's machine: the page asks no other server
    theme = Base(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=sans, font_mono=("ui-monospace", "monospace"))
    return dict(
        server_name=host,
        server_port=port or _free(host),
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
        app_kwargs={"middleware": [Middleware(Fence, limits=limits)]},
    )


def _free(host: str) -> int:
    import socket

    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]
