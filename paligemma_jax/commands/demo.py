"""`paligemma-jax demo`."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from threading import Event
from typing import Annotated

import tyro

from paligemma_jax.commands.options import (
    Base,
    Dtype,
    Mesh,
    ModelOptions,
    Names,
    Numerics,
    Quantize,
    check_port,
    flag,
)
from paligemma_jax.demo.limits import Limits


def demo(
    model: Names = ("tiny",),
    host: str = "127.0.0.1",
    port: int = 7860,
    users: int = 2,
    hosts: tuple[str, ...] = (),
    limits: Annotated[Limits, tyro.conf.arg(name="max")] = Limits(),
    dtype: Dtype = None,
    numerics: Numerics = None,
    quantize: Quantize = None,
    mesh: Mesh = None,
    base: Base = None,
    search: Annotated[str | None, flag("NAME", "no search")] = None,
    pages: Annotated[tuple[str, ...], flag("PATH [PATH ...]", "none")] = (),
) -> None:
    """Serve a web page that answers prompts about pictures, and searches pages.

    Example: paligemma-jax demo --model google/paligemma2-3b-mix-224

    Args:
        model: One or several models, as for `generate`. Several answer side by side.
        host: Address to bind to: 127.0.0.1 for this machine only, 0.0.0.0 for all, without a
            password.
        port: Port; 0 picks a free one.
        users: Number of concurrent requests; further ones wait in a queue.
        hosts: Names under which visitors open the page, if not by --host, such as a proxy's.
        dtype: Data type of the parameters: float32, bfloat16 or float16.
        numerics: Numerics profile: transformers or big_vision.
        quantize: Weight format, as for `generate`: int8, w8a8, int4, nf4, ...
        mesh: Device mesh, as for `generate`: auto, or data=2,tensor=2, ...
        base: Base checkpoint of an adapter or a run, if it has moved.
        search: ColPali checkpoint that searches pages by text, on a second tab.
        pages: Pictures, PDFs and directories to search, which are embedded at the start, or an
            index of `embed`. Visitors can add their own pictures.
    """
    _check(port, users, limits)
    if pages and search is None:
        raise ValueError("--pages needs --search, the ColPali checkpoint that searches them")
    from paligemma_jax.demo.ask import SAMPLE_PICTURE
    from paligemma_jax.demo.search import open_searcher
    from paligemma_jax.demo.server import serve
    from paligemma_jax.retrieval import retriever

    predictors = {
        name: ModelOptions(name, base, dtype, numerics, quantize, mesh=mesh).load()
        for name in model
    }
    for predictor in predictors.values():  # compile before the first visitor arrives
        next(predictor.stream(SAMPLE_PICTURE, "caption en"), None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the uploads, too
    with ExitStack() as stack:
        searcher = None
        if search is not None:
            colpali = retriever.load(search, dtype=dtype, mesh=mesh)
            searcher = stack.enter_context(open_searcher(colpali, pages))
        address = stack.enter_context(serve(predictors, limits, host, port, users, hosts, searcher))
        print(f"{address}  (press Ctrl-C to stop)", flush=True)
        Event().wait()


def _check(port: int, users: int, limits: Limits) -> None:
    if find_spec("gradio") is None:
        raise ValueError("the demo needs Gradio: pip install 'paligemma-jax[demo]'")
    check_port("--port", port)
    if users < 1:
        raise ValueError(f"--users must be at least 1, got {users}")
    for name, value in vars(limits).items():
        if not value > 0:
            raise ValueError(f"--max.{name.replace('_', '-')} must be greater than 0, got {value}")
    prompt = limits.images * limits.megabytes
    if not prompt <= limits.visitor_megabytes <= limits.total_megabytes:
        raise ValueError(
            f"--max.visitor-megabytes must be from {prompt:g} (the pictures of a prompt) to "
            f"{limits.total_megabytes:g} (--max.total-megabytes), got {limits.visitor_megabytes:g}"
        )
