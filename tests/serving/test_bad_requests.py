"""Malformed requests: a status of 4xx, one sentence in OpenAI's form, nothing else disturbed."""

from __future__ import annotations

import base64
import re
import socket
import zlib
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from PIL import Image
from support.api_server import chat, data_url, request, served, user
from support.photos import crops

import paligemma_jax as pg
from paligemma_jax.serving.limits import ServingLimits

PHOTO = crops(1)[0]
SMALL = Image.new("1", (8, 8))
ENDPOINT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    limits = ServingLimits(request_megabytes=2, upload_seconds=1)
    with served(pg.load("tiny"), limits=limits) as (address, service):
        yield address, service


def body(**fields):
    return {"model": "tiny", "messages": user("ocr", PHOTO)} | fields


def picture(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def encoded(content, kind="png"):
    return picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def png(width, height):
    """A PNG whose header states a size."""
    file = BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BAD = {
    "no JSON": (b"not json", "not readable JSON"),
    "no body": (b"", "not readable JSON"),
    "a list": ([], "the content must be an object"),
    "half a JSON": (b'{"model": "tiny", "messages": [', "not readable JSON"),
    "deep": (b"[" * 100_000, "not readable JSON|must be"),
    "not UTF-8": (b'{"model": "\xff"}', "not readable JSON|not UTF-8"),
    "no messages": ({"model": "tiny"}, "messages is missing"),
    "empty messages": (body(messages=[]), "messages must be"),
    "text as messages": (body(messages="ocr"), "messages must be an array"),
    "no model": ({"messages": user("ocr", PHOTO)}, "model is missing"),
    "other model": (body(model="gpt-4"), "model must be one of tiny, got 'gpt-4'"),
    "model of another type": (body(model=3), "model must be a string"),
    "unknown role": (body(messages=[{"role": "robot", "content": "x"}]), "role"),
    "system": (body(messages=[{"role": "system", "content": "x"}, *user("ocr")]), "system"),
    "assistant last": (body(messages=[{"role": "assistant", "content": "x"}]), "last message"),
    "no content": (body(messages=[{"role": "user"}]), "must contain text or a picture"),
    "number as content": (body(messages=[{"role": "user", "content": 7}]), "content must be"),
    "audio": (
        body(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
        "invalid value 'input_audio'",
    ),
    "picture without URL": (
        body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "image_url is missing",
    ),
    "http picture": (body(messages=picture("http://127.0.0.1/a.png")), "--allow-urls"),
    "file picture": (body(messages=picture("file:///etc/passwd")), "must be a data: URL"),
    "path": (body(messages=picture("/etc/passwd")), "must be a data: URL"),
    "data without base64": (body(messages=picture("data:image/png,abc")), "must be a URL like"),
    "bad base64": (body(messages=picture("data:image/png;base64,%%%")), "base64"),
    "empty picture": (body(messages=encoded(b"")), "no bytes"),
    "text as picture": (body(messages=encoded(b"hello" * 20)), "must be a JPEG, PNG"),
    "postscript": (body(messages=encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n")), "must be a JPEG, PNG"),
    "huge picture": (body(messages=encoded(png(60_000, 60_000))), "megapixels"),
    "large picture": (body(messages=encoded(png(9_000, 9_000))), "at most 50 megapixels"),
    "truncated picture": (body(messages=encoded(png(64, 64)[:-20])), "cannot read it completely"),
    "nine pictures": (
        body(messages=user("ocr", *[Image.new("1", (8, 8))] * 9)),
        "at most 8 pictures",
    ),
    "too many placeholders": (body(messages=user("<image><image>ocr", PHOTO)), "<image>"),
    "long prompt": (body(messages=user("ocr " * 5000, PHOTO)), "at most 10000 characters"),
    "huge n": (body(n=100), "n must be at most 16, got 100"),
    "n of 0": (body(n=0), "n must be an integer of at least 1"),
    "n as text": (body(n="two"), "n must be an integer"),
    "huge max_tokens": (body(max_tokens=100_000), "max_tokens must be at most 1024"),
    "negative max_tokens": (body(max_tokens=-1), "max_tokens must be"),
    "minimum above maximum": (body(min_tokens=9, max_tokens=3), "min_new_tokens"),
    "hot": (body(temperature=1e9), "temperature must be"),
    "negative temperature": (body(temperature=-1), "temperature must be"),
    "top_p": (body(top_p=1.5), "top_p must be"),
    "seed": (body(seed=2**70), "seed"),
    "empty stop": (body(stop=""), "stop must be|stop"),
    "many stops": (body(stop=["a"] * 100), "stop"),
    "top_logprobs alone": (body(top_logprobs=1), "requires logprobs"),
    "too many top_logprobs": (body(logprobs=True, top_logprobs=5), "--top-logprobs"),
    "stream_options alone": (body(stream_options={"include_usage": True}), "requires stream"),
    "tools": (body(tools=[{"type": "function"}]), "unknown field `tools`"),
    "penalty": (body(frequency_penalty=0.5), "frequency_penalty is not supported: it must be 0"),
    "bias": (body(logit_bias={"3": 100}), "logit_bias is not supported"),
    "unknown format": (body(response_format={"type": "xml"}), "invalid value 'xml'"),
    "no choices": (body(response_format={"type": "choices", "choices": []}), "choices must be"),
    "label of boxes": (body(response_format={"type": "boxes", "labels": ["a;b"]}), "label"),
    "new line in a name": (body(**{"a\nb": 1}), r"`a\\nb`"),
    "json": (body(response_format={"type": "json_object"}), "on this server, got json_object"),
    "many boxes": (
        body(response_format={"type": "boxes", "labels": ["3"], "least": 10**6}),
        "least must be an integer of at most 256",
    ),
    "a long grammar": (
        body(response_format={"type": "boxes", "labels": ["3"], "least": 99}, max_tokens=9),
        "must suffice for the shortest answer",
    ),
    "stream as text": (body(stream="yes"), "stream must be true or false"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_malformed_request_is_one_sentence(server, content, message):
    status, reply = request(server[0], ENDPOINT, content)
    assert 400 <= status < 500, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 500
    assert server[1].open == 0 and server[1].budget.used == 0


def test_the_server_still_answers(server):
    assert len(BAD) >= 40
    assert chat(server[0], user("ocr", PHOTO))[0] == 200


def test_types_routes_and_hosts(server):
    address = server[0]
    assert request(address, ENDPOINT, b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert request(address, ENDPOINT)[0] == 405
    assert request(address, "/v1/images")[0] == 404
    assert request(address, "/docs")[0] == 404
    assert request(address, "/health/")[0] == 404  # no redirect
    assert request(address, "/health", method="HEAD")[0] == 200
    status, reply = request(address, "/v1/models", headers={"Host": "evil.com"})
    assert status == 403 and "Host" in reply["error"]["message"]
    assert request(address, "/v1/models/other")[1]["error"]["code"] == "model_not_found"
    status, reply = request(address, "/v1/embeddings", {"model": "tiny", "input": "x"})
    assert status == 404 and "--embed" in reply["error"]["message"]


def test_large_slow_and_endless_requests_end(server):
    address = server[0]
    status, reply = request(address, ENDPOINT, body(messages=user("x" * 3_000_000)))
    assert status == 413 and reply["error"]["message"] == "a request must be at most 2 MB"
    head = f"POST {ENDPOINT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    endless = head + "Transfer-Encoding: chunked\r\n\r\n"
    assert send(address, endless, b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 2_000).startswith(
        b"HTTP/1.1 4"
    )
    slow = head + "Content-Length: 1000\r\n\r\n{"
    assert send(address, slow).startswith(b"HTTP/1.1 408")
    assert server[1].budget.used == 0
    assert chat(address, user("ocr", PHOTO))[0] == 200


def send(address, head, part=b"", times=0):
    """Send a request by hand, as much of it as the server takes. Returns the reply."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(times):
                connection.sendall(part)
        except OSError:
            pass
        try:
            return connection.recv(4096)
        except ConnectionResetError:
            return b"HTTP/1.1 413 (reset)"


def test_prompt_and_answer_fit_a_row(server):
    assert request(server[0], ENDPOINT, body(max_tokens=1024))[0] == 200
    long = user("ocr " * 1200, PHOTO)
    status, reply = chat(server[0], long, max_tokens=1024)
    assert status == 400 and "of the 1344 slots of a row" in reply["error"]["message"]
    assert reply["error"]["code"] == "context_length_exceeded"
    # without max_tokens, the answer may take what is left
    status, reply = chat(server[0], user("4 " * 620, PHOTO), min_tokens=2)
    assert status == 200 and reply["usage"]["completion_tokens"] <= 1344 - 1280


def test_base64_in_lines(server):
    url = data_url(PHOTO)
    wrapped = url[:40] + "\n".join(url[40:][i : i + 76] for i in range(0, len(url), 76))
    assert request(server[0], ENDPOINT, body(messages=picture(wrapped)))[0] == 200


def test_half_bodies_leave_room_for_others(server):
    head = f"POST {ENDPOINT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    parts = urlsplit(server[0])
    server[1].budget.limit = 3e6
    connections = [socket.create_connection((parts.hostname, parts.port)) for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{head}Content-Length: 1900000\r\n\r\n{{".encode())
    assert chat(server[0], user("ocr", PHOTO))[0] == 200
    for connection in connections:
        connection.close()
