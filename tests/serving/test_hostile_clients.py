"""Clients that hold connections, send no HTTP, or write into the log."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request

from paligemma_jax.serving import protocol
from paligemma_jax.serving.app import _Guard
from paligemma_jax.serving.errors import ApiError
from paligemma_jax.serving.hosts import Hosts
from paligemma_jax.serving.limits import (
    ChatLimits,
    EngineShape,
    PictureLimits,
    ServingLimits,
    check_limits,
)
from paligemma_jax.serving.measures import Measures
from paligemma_jax.serving.protocol import Protocol
from paligemma_jax.serving.replies import _logprob
from paligemma_jax.serving.server import bind
from paligemma_jax.serving.service import Budget
from paligemma_jax.serving.worker import Worker

HEAD = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def port():
    """The port of a server with this protocol and no engine. `/endless` streams."""
    with pytest.MonkeyPatch.context() as patch, listening(application) as number:
        patch.setattr(protocol, "WATCH_SECONDS", 0.25)
        yield number


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        while not RELEASED.is_set():
            await send({"type": "http.response.body", "body": b"x" * 10**6, "more_body": True})
            await asyncio.sleep(0)  # sending to a client that has left does not wait
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    await send({"type": "http.response.body", "body": b"done"})


RELEASED = threading.Event()


@contextmanager
def listening(app):
    bound = bind("127.0.0.1", 0)
    bound.listen()  # clients wait for the thread
    config = uvicorn.Config(app, http=Protocol, ws="none", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        RELEASED.set()
        server.should_exit = True
        thread.join()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def rest(connection):
    """Everything up to the end of a connection."""
    content = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            content += part
    return content


def test_a_client_that_sends_no_complete_head_is_closed(port):
    idle, half, dripping = (connect(port) for _ in range(3))
    half.sendall(HEAD)
    start = time.monotonic()
    for byte in b"X: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":
        with suppress(OSError):
            dripping.sendall(bytes([byte]))
        time.sleep(0.03)
    assert rest(idle) == rest(half) == rest(dripping) == b""
    assert time.monotonic() - start < 3


def test_a_client_that_waits_is_not_closed(port):
    connection = connect(port)
    connection.sendall(HEAD.replace(b"/ ", b"/slow ", 1) + b"Connection: close\r\n\r\n")
    assert b"done" in rest(connection)


def test_a_client_that_does_not_read_is_closed(port):
    connection = connect(port)
    connection.sendall(HEAD.replace(b"/ ", b"/endless ", 1) + b"\r\n")
    time.sleep(1.2)
    assert b"done" not in rest(connection)  # with its end, before the application's


def test_invalid_http_is_an_error_like_the_others(port, caplog):
    connection = connect(port)
    connection.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
    reply = rest(connection)
    assert reply.startswith(b"HTTP/1.1 400") and b'"type": "invalid_request_error"' in reply
    late = connect(port)  # invalid after its reply has begun
    late.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    assert b"200" in late.recv(100)
    late.sendall(b"zz\r\n")
    rest(late)
    assert "Traceback" not in caplog.text and not any(r.exc_info for r in caplog.records)


def test_connections_leave_files_for_the_process(port, monkeypatch):
    monkeypatch.setattr(protocol, "max_connections", lambda: 0)
    connection = connect(port)
    assert rest(connection) == b""


class Keys:
    """A service with one key."""

    keys = frozenset({"schlüssel"})
    hosts = Hosts("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "sent", "allowed"),
    [
        ("127.0.0.1", "Bearer schlüssel", True),
        ("127.0.0.1", "bearer schlüssel", True),
        ("127.0.0.1", "schlüssel", False),
        ("127.0.0.1", "Bearer ", False),
        ("127.0.0.1/health?", "", False),  # older versions of Starlette make a path of it
        ("127.0.0.1/health#", "", False),
    ],
)
def test_keys_are_bytes_and_the_host_is_no_path(host, sent, allowed):
    headers = [(b"host", host.encode()), (b"authorization", sent.encode())]
    scope = dict(type="http", path="/v1/models", headers=headers, query_string=b"", method="GET")
    guard = _Guard(None, Keys())  # type: ignore[arg-type]
    if allowed:
        guard._check(Request(scope))
    else:
        with pytest.raises(ApiError, match="Bearer") as error:
            guard._check(Request(scope))
        assert error.value.headers == {"WWW-Authenticate": "Bearer"}


def test_messages_are_one_short_line():
    message = str(ApiError(400, "unknown `a\n12:00:00 200 /fake\x1b[31m\u202e" + "k" * 10**6))
    assert message.startswith(r"unknown `a\n12:00:00 200 /fake\x1b[31m\u202ek")
    assert len(message) == 500 and message.endswith(" ...")
    assert str(ApiError(400, "é 𝕏")) == "é 𝕏"


def test_only_bytes_that_came_count():
    budget = Budget(10)
    with budget.reserve(), budget.reserve() as count:
        count(6)
        with pytest.raises(ApiError, match="too many requests"):
            count(5)
        assert budget.used == 6
    assert budget.used == 0


GROUPS = ServingLimits, EngineShape, ChatLimits, PictureLimits


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_limits_are_checked(value):
    for kind in GROUPS:
        check_limits(kind())
        for name in kind.__dataclass_fields__:
            flag = f"--max.{name}".replace("_", "-")
            with pytest.raises(ValueError, match=f"^{flag} must be .*, got {value}$"):
                check_limits(kind(**{name: value}), "max.")


def test_a_host_that_is_none():
    for host in ("", "no host", "1.2.3.4"):
        with pytest.raises(ValueError, match=r"^--host must be an address"):
            bind(host, 0)


def test_infinity_is_not_json():
    assert _logprob("a", -math.inf)["logprob"] == -9999.0


class FakeTicket:
    number, index = 0, 0

    def __init__(self):
        self.sent = []

    def send(self, index, event):
        self.sent.append(event)


def test_a_late_cancel_ends_no_answer_of_the_next_engine():
    worker = Worker(lambda: None, lambda _: None)  # type: ignore[arg-type]
    old: Any = FakeTicket()
    new: Any = FakeTicket()  # the numbers of a new engine begin at 0 again
    worker.tickets[0] = new
    worker._cancel([old])
    assert worker.tickets == {0: new}


class Closable:
    """An engine that is not used."""

    def __exit__(self, *_):
        pass


def test_a_stop_does_not_wait_for_all_programs():
    compiled = []

    def warm_up(_):
        for program in range(100):
            compiled.append(program)
            yield time.sleep(0.02)

    worker = Worker(Closable, warm_up)  # type: ignore[arg-type]
    worker.start()
    worker.stop()
    assert len(compiled) < 50 and not worker.ready and not worker.failed


def test_a_cancelled_request_is_answered():
    """uvicorn cancels requests that are open too long after a stop, and logs what they raise."""
    sent = []

    async def cancelled(*_):
        raise asyncio.CancelledError

    async def send(message):
        sent.append(message)

    class Open(Keys):
        keys = frozenset()
        measures = Measures()

    scope = dict(type="http", path="/x", headers=[(b"host", b"127.0.0.1")], method="GET")
    asyncio.run(_Guard(cancelled, Open())(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 503 and b"stopping" in sent[1]["body"]


def test_a_failed_worker_answers_at_once(caplog):
    def broken(_):
        raise RuntimeError("no memory")

    caplog.set_level(logging.CRITICAL)
    worker = Worker(lambda: None, broken)  # type: ignore[arg-type]
    ticket: Any = FakeTicket()
    worker.submit([ticket])
    worker.start()
    worker.stop()
    (error,) = ticket.sent
    assert worker.failed and error.status == 503
