"""Pictures from URLs: never from this network, and within size and time."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paligemma_jax.serving import download as module
from paligemma_jax.serving.download import download, is_public

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",  # metadata of clouds
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1%eth0",
    "fc00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
]


def test_private_addresses():
    for address in PRIVATE:
        assert not is_public(address), address
    for address in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(address), address


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        getattr(self, self.path.strip("/").partition("?")[0])()

    def reply(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def picture(self):
        self.reply(200, b"picture")

    def endless(self):
        self.reply(200)
        for _ in range(1000):
            self.wfile.write(b"x" * 10_000)

    def slow(self):
        self.reply(200)
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def slow_head(self):
        for _ in range(100):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" if _ == 0 else b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def moved(self):
        self.reply(302, Location="/picture")

    def moved_inside(self):
        self.reply(302, Location="http://169.254.169.254/latest/meta-data")

    def circle(self):
        self.reply(302, Location="/circle")

    def log_message(self, *_):
        pass


@contextmanager
def files():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()


@pytest.fixture
def site(monkeypatch):
    """A server of files whose address counts as public."""
    public = module.is_public
    monkeypatch.setattr(module, "is_public", lambda a: a == "127.0.0.1" or public(a))
    with files() as (address, _):
        yield address


def test_a_picture_is_fetched(site):
    assert download(f"{site}/picture?size=2", 100, 5) == b"picture"
    assert download(f"{site}/moved", 100, 5) == b"picture"


BAD = {
    "endless": "must be at most 0.05 MB",
    "slow": "must be fetched within 0.5 s",
    "slow_head": "must be fetched within 0.5 s",
    "moved_inside": "private or local network, got the host '169.254.169.254'",
    "circle": "must redirect at most 3 times",
}


@pytest.mark.parametrize(("path", "message"), BAD.items(), ids=BAD)
def test_what_is_not_fetched(site, path, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        download(f"{site}/{path}", 50_000, 0.5)
    assert time.monotonic() - start < 3


def test_a_private_host_is_not_asked():
    with files() as (address, server):
        for url in (address, address.replace("127.0.0.1", "localhost"), "http://[::1]/"):
            with pytest.raises(ValueError, match=r"private or local network"):
                download(f"{url}/picture", 100, 5)
        port = address.rsplit(":", 1)[1]
        for name in ("2130706433", "0x7f.1", "127.1"):  # other spellings of 127.0.0.1
            with pytest.raises(ValueError, match=r"private or local network|cannot be fetched"):
                download(f"http://{name}:{port}/picture", 100, 5)
        assert server.asked == []


def test_the_address_that_was_checked_is_the_one_asked(monkeypatch):
    """A name server that answers differently the second time (DNS rebinding)."""
    answers = iter(["8.8.8.8", "127.0.0.1"])
    connected = []

    def look_up(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address, timeout):
        connected.append(address)
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(module.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(module.socket, "create_connection", connect)
    with pytest.raises(ValueError, match=r"cannot be fetched: Connection refused"):
        download("http://rebind.example/a.png", 100, 5)
    assert connected == [("8.8.8.8", 80)]


@pytest.mark.parametrize(
    "url", ["http://", "http:///a", "http://user:pw@example.org/", "http://a b/", "http://[x/", "x"]
)
def test_a_url_that_is_none(url):
    with pytest.raises(ValueError, match=r"a URL must be like"):
        download(url, 100, 5)
