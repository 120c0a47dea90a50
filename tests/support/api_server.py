"""A server of `tiny` with OpenAI's API in a thread, and requests to it."""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from time import monotonic, sleep
from urllib.parse import urlsplit

from PIL import Image

from paligemma_jax.serving.hosts import Hosts
from paligemma_jax.serving.limits import EngineShape
from paligemma_jax.serving.server import serving
from paligemma_jax.serving.service import Service

JSON = {"Content-Type": "application/json"}


@contextmanager
def served(predictor, shape=EngineShape(rows=4), **options):
    """The address of a server that is ready, and its service."""
    service = Service(predictor, "tiny", Hosts("127.0.0.1"), shape, **options)
    with serving(service) as address:
        wait(lambda: request(address, "/health")[0] == 200, 120)
        yield address, service


def wait(condition, seconds=10.0):
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        sleep(0.02)


def request(address, path, body=None, headers=JSON, method=None):
    """Return status and body, decoded if it is JSON."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
        reply = connection.getresponse()
        content = reply.read()
        is_json = reply.headers.get_content_type() == "application/json"
        return reply.status, json.loads(content) if is_json and content else content
    finally:
        connection.close()


def chat(address, messages, **options):
    return request(address, "/v1/chat/completions", dict(model="tiny", messages=messages) | options)


def picture_bytes(image, kind="PNG"):
    """The file of a PIL image."""
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(image, kind="PNG"):
    """A data URL of a PIL image, or of bytes."""
    if isinstance(image, Image.Image):
        image = picture_bytes(image, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def user(text, *images):
    """A message with texts and pictures."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
