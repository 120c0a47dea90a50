"""The web server, bound to this machine by default and restricted to the routes of the page."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paligemma_jax.demo.gate import Gate
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.search import Searcher
from paligemma_jax.demo.uploads import Uploads
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.serving.hosts import Hosts

STYLE = Path(__file__).with_name("style.css")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # no web fonts
MONO = ("ui-monospace", "monospace")


@contextmanager
def serve(
    predictors: dict[str, Predictor],
    limits: Limits = Limits(),
    host: str = "127.0.0.1",
    port: int = 7860,
    users: int = 2,
    hosts: tuple[str, ...] = (),
    searcher: Searcher | None = None,
) -> Iterator[str]:
    """Serve the page inside a `with` block and yield its address. Uploads are deleted at the end.

    Args:
        predictors: The models by display name.
        limits: Limits on what visitors may send.
        host: Address to bind to.
        port: Port; 0 picks a free one.
        users: Number of concurrent requests; further ones wait in a queue.
        hosts: Names besides `host` under which visitors may open the page, such as a proxy's.
        searcher: Finds pages on a second tab.

    Raises:
        ValueError: The port is in use or not permitted.
    """
    with tempfile.TemporaryDirectory(prefix="paligemma-demo-") as folder, _environment(folder):
        from paligemma_jax.demo.page import build

        page = build(predictors, limits, users, searcher).queue(max_size=32, api_open=False)
        uploads = Uploads(Path(folder), limits)
        gate: dict[str, Any] = dict(limits=limits, hosts=Hosts(host, hosts), uploads=uploads)
        gate["many"] = searcher is not None
        try:
            _, address, _ = page.launch(**_launch_options(limits, host, port, gate))
        except OSError:
            raise ValueError(
                f"port {port} on {host} is in use or not permitted; "
                "choose another one with --port (0 picks a free port)"
            ) from None
        uploads.keep_present()
        try:
            yield address
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Set the folder of uploads, and no telemetry. Gradio reads these both when it is imported and
    when it runs, so a process has one server at a time."""
    before = dict(os.environ)
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        yield
    finally:
        os.environ.pop("GRADIO_TEMP_DIR")
        os.environ |= before


def _launch_options(
    limits: Limits, host: str, port: int, gate: dict[str, Any]
) -> dict[str, Any]:  # Any: keyword arguments of Gradio and of `Gate`
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
        max_file_size=int(limits.megabytes * 1e6),
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(Gate, **gate)]},
    )


def _free_port(host: str) -> int:
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]
