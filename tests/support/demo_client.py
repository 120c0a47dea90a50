"""HTTP requests to the demo, from any address of this machine's loopback network."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from urllib.parse import urlsplit

from paligemma_jax.demo.ask import Settings

VISITOR = "127.0.0.1"


def request(url, data=None, visitor=VISITOR, **headers):
    """Return status and body: of a GET, or with `data` of a POST."""
    status, _, body = exchange(url, data, visitor, **headers)
    return status, body


def exchange(url, data=None, visitor=VISITOR, **headers):
    """Return status, headers and body. An underscore in the name of a header stands for a dash."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=20, source_address=(visitor, 0))
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET" if data is None else "POST", path or "/", data, headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()
    finally:
        connection.close()


def form(content, name="x.png"):
    """The body of an upload."""
    head = b'Content-Disposition: form-data; name="files"; filename="%s"' % name.encode()
    return b"--b\r\n%s\r\n\r\n%s\r\n--b--\r\n" % (head, content)


FORM = {"Content_Type": "multipart/form-data; boundary=b"}


def upload(address, content, name="x.png", visitor=VISITOR, **headers):
    """Return status and body; of an upload that succeeds, a JSON list of paths."""
    url = f"{address}/gradio_api/upload"
    return request(url, form(content, name), visitor, **FORM, **headers)


def run(address, picture, prompt="ocr", **settings):
    """Run a prompt by hand, with `picture` as the first one. Returns all that is answered."""
    config = json.loads(request(f"{address}/config")[1])
    number, event = next(
        (n, event) for n, event in enumerate(config["dependencies"]) if len(event["inputs"]) > 5
    )
    values = vars(Settings()) | settings
    pictures = [picture] + [None] * (len(event["inputs"]) - len(values) - 2)
    data = [*pictures, prompt, *values.values()]
    body = {"data": data, "fn_index": event.get("id", number), "session_hash": "byhand"}
    join = f"{address}/gradio_api/queue/join"
    status, answer = request(join, json.dumps(body).encode(), Content_Type="application/json")
    if status != 200:
        return answer.decode()
    return request(f"{address}/gradio_api/queue/data?session_hash=byhand")[1].decode()


def file_data(path):
    """A picture, as the page sends it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}
