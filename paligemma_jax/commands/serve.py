"""`paligemma-jax serve`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from paligemma_jax.commands.options import (
    Base,
    Dtype,
    File,
    Mesh,
    ModelOptions,
    Name,
    Numerics,
    Quantize,
    check_port,
    flag,
    require_file,
)
from paligemma_jax.serving.limits import (
    ChatLimits,
    EngineShape,
    PictureLimits,
    ServingLimits,
    check_limits,
)

if TYPE_CHECKING:
    from paligemma_jax.serving.service import Service

KEY_VARIABLE = "PALIGEMMA_JAX_API_KEYS"


def serve(
    model: Name = "tiny",
    name: Annotated[str | None, flag("NAME", "that of --model")] = None,
    adapters: Annotated[tuple[str, ...], flag("NAME=PATH [NAME=PATH ...]", "none")] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    hosts: tuple[str, ...] = (),
    engine: Annotated[EngineShape, tyro.conf.arg(name="")] = EngineShape(),
    limits: Annotated[ServingLimits, tyro.conf.arg(name="max")] = ServingLimits(),
    chat: Annotated[ChatLimits, tyro.conf.arg(name="max")] = ChatLimits(),
    picture: Annotated[PictureLimits, tyro.conf.arg(name="max")] = PictureLimits(),
    allow_urls: bool = False,
    api_keys: File = None,
    top_logprobs: int = 0,
    embed: Annotated[str | None, flag("NAME", "no embeddings")] = None,
    demo_port: Annotated[int | None, flag("PORT", "no page")] = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    quantize: Quantize = None,
    mesh: Mesh = None,
    base: Base = None,
) -> None:
    """Serve a model to programs that know OpenAI's API.

    Example: paligemma-jax serve --model google/paligemma2-3b-mix-224

    Args:
        model: Model, as for `generate`.
        name: Name of the model in requests.
        adapters: LoRA adapters of the model, each under a name of its own: requests for one are
            decoded together with those for the model and for others.
        host: Address to bind to: 127.0.0.1 for this machine only, 0.0.0.0 for all.
        port: Port; 0 picks a free one.
        hosts: Further names that clients may use for the server, such as a proxy's.
        allow_urls: Fetch pictures from http and https URLs, from public addresses only. Without
            this flag, requests must contain their pictures as data URLs.
        api_keys: File with one key per line; each request must send one of them. Keys can also be
            set in PALIGEMMA_JAX_API_KEYS, separated by commas. By default no key is needed.
        top_logprobs: Maximum number of most likely tokens that a request may ask for, up to 20.
        embed: ColPali checkpoint for /v1/embeddings.
        demo_port: Also serve the demo page, on this port. Its answers are decoded together with
            the requests.
        dtype: Data type of the parameters: float32, bfloat16 or float16.
        numerics: Numerics profile: transformers or big_vision.
        quantize: Weight format, as for `generate`: int8, w8a8, int4, nf4, ...
        mesh: Device mesh, as for `generate`: auto, or data=2,tensor=2, ...
        base: Base checkpoint of an adapter or a run, if it has moved.
    """
    keys, paths = _read_keys(api_keys), _parse_adapters(adapters)
    _check(port, top_logprobs, demo_port)
    check_limits(engine)
    for group in (limits, chat, picture):
        check_limits(group, "max.")
    if name is not None and not name.strip():
        raise ValueError("--name must not be empty")
    from paligemma_jax.inference.adapters import open_adapters
    from paligemma_jax.retrieval import retriever
    from paligemma_jax.serving.hosts import Hosts
    from paligemma_jax.serving.server import Server, address_of, bind, log_to_stderr
    from paligemma_jax.serving.service import Service

    listening = bind(host, port)  # before the model is loaded, so that errors are raised early
    if demo_port:
        bind(host, demo_port, "--demo-port").close()
    log_to_stderr()
    predictor = ModelOptions(model, base, dtype, numerics, quantize, mesh=mesh).load()
    service = Service(
        predictor,
        name or Path(model).name,
        Hosts(host, hosts),
        engine,
        limits,
        chat,
        picture,
        keys,
        allow_urls,
        top_logprobs,
        open_adapters(paths, predictor.config),
        None if embed is None else retriever.load(embed, dtype=dtype, mesh=mesh),
        "" if embed is None else Path(embed).name,
    )
    print(f"{address_of(listening)}/v1  (press Ctrl-C to stop)", flush=True)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        print(
            "paligemma-jax: anyone who can reach this address can use the server: see --api-keys",
            file=sys.stderr,
        )
    with ExitStack() as stack:
        if demo_port is not None:
            page = _serve_page(service, host, demo_port, hosts)
            print(f"{stack.enter_context(page)}  (demo page)", flush=True)
        Server(service, [listening]).run_until_stopped()


def _serve_page(
    service: Service, host: str, port: int, hosts: tuple[str, ...]
) -> AbstractContextManager[str]:
    from paligemma_jax.demo import server
    from paligemma_jax.demo.limits import Limits
    from paligemma_jax.serving.shared import SharedPredictor

    predictor = SharedPredictor.of(service.predictor, service.worker)
    limits = Limits(new_tokens=min(Limits.new_tokens, service.chat.new_tokens))
    return server.serve({service.name: predictor}, limits, host, port, service.rows, hosts)


def _parse_adapters(adapters: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in adapters]
    for text, (name, _, path) in zip(adapters, pairs, strict=True):
        if not name or not path:
            raise ValueError(f"--adapters must be like NAME=PATH, got {text!r}")
    paths = {name: path for name, _, path in pairs}
    if len(paths) < len(adapters):
        raise ValueError(f"--adapters must have different names, got {' '.join(adapters)}")
    return paths


def _read_keys(file: str | None) -> frozenset[str]:
    keys = os.environ.get(KEY_VARIABLE, "").split(",")
    if file is not None:
        require_file("--api-keys", file)
        try:
            keys += Path(file).read_text().splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--api-keys must be a text file, got {file}") from None
        if not any(key.strip() for key in keys):
            raise ValueError(f"--api-keys must be a file with one key per line, got {file}")
    return frozenset(key.strip() for key in keys if key.strip())


def _check(port: int, top_logprobs: int, demo_port: int | None) -> None:
    if demo_port is not None and not find_spec("gradio"):
        raise ValueError("--demo-port needs Gradio: pip install 'paligemma-jax[demo]'")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise ValueError(f"serve needs {missing[0]}: pip install 'paligemma-jax[serve]'")
    check_port("--port", port)
    check_port("--demo-port", demo_port or 0)
    if not 0 <= top_logprobs <= 20:
        raise ValueError(f"--top-logprobs must be from 0 to 20, got {top_logprobs}")
