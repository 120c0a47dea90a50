"""The routes of the API."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from convert.typed_json import decode
from paligemma_jax.inference.answer import Answer
from paligemma_jax.serving.asgi import App, Body, Message, Receive, Refusal, Send
from paligemma_jax.serving.chat import Question, read_chat
from paligemma_jax.serving.embeddings import embed
from paligemma_jax.serving.errors import ApiError, JsonObject, printable, stopping
from paligemma_jax.serving.replies import Reply, event
from paligemma_jax.serving.schema import ChatRequest, EmbeddingRequest
from paligemma_jax.serving.service import Service
from paligemma_jax.serving.worker import Answers, Event

LOGGER = logging.getLogger("paligemma_jax.serving")
OPEN_ROUTES = {"/health"}  # without a key
QUIET_ROUTES = {"/health", "/metrics"}  # not logged
DRAIN_SECONDS = 5.0  # for the rest of a refused request, before the reply
T = TypeVar("T")


def make_app(service: Service) -> FastAPI:
    """The application of a service, which starts its engine and stops it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.add_middleware(_Guard, service=service)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JsonObject:
        service.check_open()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.measures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> JsonObject:
        return {"object": "list", "data": [_model(name, service) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonObject:
        _check_model(name, service.names)
        return _model(name, service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _Chat(service, request).run()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JsonObject:
        service.check_open()
        with ExitStack() as stack:
            body = await _read(request, service, EmbeddingRequest, stack)
            return await _in_thread(service.embedders, lambda: embed(body, service))

    return app


@dataclass(frozen=True)
class _Guard:
    """ASGI middleware that checks the Host header and the key of each request, and logs it."""

    app: App
    service: Service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        request = Request(scope)

        async def noting_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(request)
            await self.app(scope, receive, noting_send)
        except ApiError as error:
            await _api_error(request, error)(scope, receive, noting_send)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if not status:
                await _api_error(request, stopping())(scope, receive, noting_send)
        finally:
            self._note(request, status, time.monotonic() - start)

    def _check(self, request: Request) -> None:
        try:
            self.service.hosts.check(request.headers.get("host", ""))
        except Refusal as refusal:
            raise ApiError(refusal.status, str(refusal)) from None
        keys = self.service.keys
        # Not request.url, which older versions of Starlette build from the Host header.
        if not keys or request.scope["path"] in OPEN_ROUTES:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key_bytes = given.strip().encode("latin-1")  # as they were sent
        is_known = any([hmac.compare_digest(key_bytes, key.encode()) for key in keys])
        if scheme.lower() != "bearer" or not is_known:
            raise ApiError(
                401,
                "the Authorization header must be `Bearer KEY` with a key of this server",
                "api_key",
            )

    def _note(self, request: Request, status: int, seconds: float) -> None:
        route = getattr(request.scope.get("route"), "path", "other")
        self.service.measures.requests.labels(route, str(status)).inc()
        if route not in QUIET_ROUTES:
            note = getattr(request.state, "note", "")
            path = printable(request.scope["path"], 100)
            LOGGER.info("%d %s %.2f s  %s", status, path, seconds, note)


@dataclass
class _Chat:
    """One request to /v1/chat/completions."""

    service: Service
    request: Request
    stack: ExitStack = field(default_factory=ExitStack)  # what ends with the reply
    tokens: int = 0  # of all answers

    async def run(self) -> Response:
        """Answer the request. Errors up to the first token have a status of their own."""
        service = self.service
        service.check_open()
        service.check_queue()
        deadline = time.monotonic() + service.limits.seconds
        try:
            body = await _read(self.request, service, ChatRequest, self.stack)
            _check_model(body.model, service.names)
            question = await _in_thread(service.readers, lambda: self._question(body))
            service.check_open()
            service.check_queue(len(question.seeds))
            adapter = None if body.model == service.name else body.model
            answers = Answers(service.worker, question, bool(body.stream), adapter)
            self.stack.callback(answers.cancel)
            self.stack.enter_context(service.counted(len(question.seeds)))
            events = _Events(self.request, answers, deadline)
            first = await events.next()  # an error here is the error of the request
            reply = Reply(
                f"chatcmpl-{uuid.uuid4().hex}",
                int(time.time()),
                body.model,
                question,
                service.predictor,
                bool(body.logprobs),
            )
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                stack, self.stack = self.stack, ExitStack()  # the stream closes it
                chunks = self._stream(reply, events, first, usage, stack)
                return StreamingResponse(chunks, media_type="text/event-stream")
            done = await self._collect(events, first)
            return JSONResponse(await asyncio.to_thread(reply.completion, done))
        finally:
            self.stack.close()

    def _question(self, body: ChatRequest) -> Question:
        service = self.service
        return read_chat(
            body,
            service.predictor,
            service.chat,
            service.pictures,
            service.allow_urls,
            service.top,
            service.slots,
        )

    async def _collect(self, events: _Events, first: tuple[int, Event]) -> list[Answer]:
        """All answers, in order."""
        done: dict[int, Answer] = {}
        index, value = first
        while True:
            if isinstance(value, Answer):
                done[index] = value
                self._count(events, index, value)
            if len(done) == events.count:
                return [done[n] for n in range(events.count)]
            index, value = await events.next()

    async def _stream(
        self, reply: Reply, events: _Events, first: tuple[int, Event], usage: bool, stack: ExitStack
    ) -> AsyncIterator[str]:
        with stack:
            for chunk in reply.begin():
                yield event(chunk)
            done: dict[int, Answer] = {}
            try:
                index, value = first
                while True:
                    if isinstance(value, Answer):
                        done[index] = value
                        self._count(events, index, value)
                        yield event(await asyncio.to_thread(reply.end, index, value))
                    elif not isinstance(value, ApiError):
                        chunk = reply.chunk(index, value)
                        if chunk is not None:
                            yield event(chunk)
                    if len(done) == events.count:
                        break
                    index, value = await events.next()
                if usage:
                    yield event(reply.usage_chunk(list(done.values())))
            except ApiError as error:
                yield event(error.body())
            yield event("[DONE]")

    def _count(self, events: _Events, index: int, answer: Answer) -> None:
        ticket = events.answers.tickets[index]
        self.service.measures.add(ticket, answer)
        self.tokens += len(answer.tokens)
        images, first = ticket.prompt.images, ticket.first or time.monotonic()
        self.request.state.note = (
            f"{len(images)} picture{'' if len(images) == 1 else 's'}, "
            f"{len(ticket.prompt)} + {self.tokens} tokens, first after "
            f"{first - ticket.arrived:.2f} s"
        )


@dataclass
class _Events:
    """The events of the answers to one request, until its client leaves or its time is over."""

    request: Request
    answers: Answers
    deadline: float
    gone: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        return len(self.answers.tickets)

    async def next(self) -> tuple[int, Event]:
        """The next event. ApiError for an error, after the deadline, and if the client has left."""
        if self.gone is None:
            self.gone = asyncio.create_task(_wait_for_disconnect(self.request))
        get = asyncio.create_task(self.answers.events.get())
        try:
            done, _ = await asyncio.wait(
                {get, self.gone},
                timeout=max(self.deadline - time.monotonic(), 0),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            if not get.done():
                get.cancel()
        if get in done:
            index, value = get.result()
            if isinstance(value, ApiError):
                raise value
            return index, value
        if self.gone in done:
            raise ApiError(499, "the client disconnected")
        raise ApiError(
            503, "the request took too long: try again later, or ask for fewer tokens", "timeout"
        )


async def _wait_for_disconnect(request: Request) -> None:
    message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await request.receive()


async def _read(request: Request, service: Service, kind: type[T], stack: ExitStack) -> T:
    """Read the body of a request, whose bytes count until `stack` is closed.

    Raises:
        ApiError: It is too large, too slow, or not JSON of this kind.
    """
    limits, limit = service.limits, service.limits.request_megabytes * 1e6
    body = Body(request.receive, limit)
    try:
        _check_headers(request, limit)
        count = stack.enter_context(service.budget.reserve())
        async with asyncio.timeout(limits.upload_seconds):
            content = await body.read(count)
    except ApiError:
        await _drain(body)
        raise
    except TimeoutError:
        seconds = limits.upload_seconds
        raise ApiError(408, f"the request must be sent within {seconds:g} s", "slow") from None
    except Refusal:
        await _drain(body)
        raise _too_large(limit) from None
    try:
        return await asyncio.to_thread(decode, content, kind)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


async def _drain(body: Body) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await body.drain()


def _too_large(limit: float) -> ApiError:
    return ApiError(413, f"a request must be at most {limit / 1e6:g} MB", "too_large")


def _check_headers(request: Request, limit: float) -> None:
    """Raise ApiError for a request that is not JSON, or says that it is too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other types, a page of another site may send unasked
        raise ApiError(415, f"the Content-Type header must be application/json, got {kind[:100]!r}")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18:
        raise ApiError(400, "the Content-Length header must be a number of bytes")
    if int(length) > limit:
        raise _too_large(limit)


async def _in_thread(threads: Executor, function: Callable[[], T]) -> T:
    """Run a function that may raise ValueError because of the request."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, function)
    except ValueError as error:
        raise ApiError(400, " ".join(str(error).split())) from None


def _check_model(name: str, names: list[str]) -> None:
    if name not in names:
        listed = ", ".join(names)
        raise ApiError(
            404, f"model must be one of {listed}, got {name[:100]!r}", "model_not_found", "model"
        )


def _model(name: str, service: Service) -> JsonObject:
    return dict(id=name, object="model", created=service.created, owned_by="paligemma-jax")


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.note = str(error)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the router: 404 and 405."""
    assert isinstance(error, HTTPException)
    path = printable(request.scope["path"], 100)
    message = f"{printable(request.method, 20)} {path}: {error.detail.lower()}"
    return _api_error(request, ApiError(error.status_code, message))


def _bug(request: Request, error: Exception) -> Response:
    """An internal error, whose traceback goes to the log."""
    return _api_error(request, ApiError(500, "the server failed: see its log"))
