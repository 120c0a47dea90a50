"""`paligemma-jax demo`."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from threading import Event
from typing import Annotated

import tyro

from paligemma_jax.commands.options import Dtype, Mesh, ModelOptions, Names, Numerics, Quantize
from paligemma_jax.demo.limits import Limits


def demo(
    model: Names = ("tiny",),
    host: str = "127.0.0.1",
    port: int = 7860,
    users: int = 2,
    limits: Annotated[Limits, tyro.conf.arg(name="max")] = Limits(),
    dtype: Dtype = None,
    numerics: Numerics = None,
    quantize: Quantize = None,
    mesh: Mesh = None,
) -> None:
    """Show a page in the browser that answers prompts about pictures.

    Example: paligemma-jax demo --model google/paligemma2-3b-mix-224

    Args:
        model: As for generate; several are asked side by side, as a checkpoint and its adapter.
        host: Who may come: 127.0.0.1 is this machine alone, 0.0.0.0 everybody in the network, without a password.
        port: Where; 0 takes any that is free.
        users: How many are answered at the same time; others wait in a queue.
        dtype: float32, bfloat16 or float16.
        numerics: transformers or big_vision, where the two compute different numbers.
        quantize: As for generate: int8, int4, nf4, ...
        mesh: As for generate: auto, or data=2,tensor=2, ...
    """
    if find_spec("gradio") is None:
        raise ValueError("the page needs an extra: pip install 'paligemma-jax[demo]'")
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: it can be 0 (any that is free) to 65535")
    if users < 1:
        raise ValueError(f"--users {users}: it can be 1 or more")
    for name, value in vars(limits).items():
        if not value > 0:
            raise ValueError(f"--max.{name.replace('_', '-')} {value}: it has to be above 0")
    from paligemma_jax.demo.ask import PICTURE
    from paligemma_jax.demo.server import served

    predictors = {one: ModelOptions(one, dtype, numerics, quantize, mesh).load() for one in model}
    for predictor in predictors.values():
        next(predictor.stream(PICTURE, "caption en"), None)  # compiles, so that the first visitor need not wait
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of uploads goes then too
    with served(predictors, limits, host, port, users) as address:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        Event().wait()
