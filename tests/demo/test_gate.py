"""What the demo's server lets through: hosts, uploads and their space, files, and bodies."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from time import monotonic
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image
from support.demo_client import FORM, exchange, file_data, form, request, run, upload
from support.paths import DIGITS

from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.uploads import Uploads
from paligemma_jax.serving.hosts import Hosts

LIMITS = Limits(megabytes=1, images=2, visitor_megabytes=3, total_megabytes=5)
SIZE = 900_000


class Sizes:
    """A predictor that answers with the sizes of the pictures."""

    def stream(self, images, prompt, *_, **__):
        yield f"{prompt} {[image.size for image in images]}"


@pytest.fixture(scope="module")
def address():
    from paligemma_jax.demo.server import serve

    with serve({"sizes": Sizes()}, LIMITS, port=0, hosts=("demo.example",)) as address:
        yield address.rstrip("/")


@pytest.fixture
def other(address, counter=iter(range(2, 250))):
    """The address of a visitor who has not been here before."""
    return f"127.0.0.{next(counter)}"


def stored(address):
    """The files of the server, and their size."""
    folder = Path(json.loads(upload(address, b"x")[1])[0]).parents[1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return files, sum(path.stat().st_size for path in files)


# hosts


@pytest.mark.parametrize(
    "bound, allowed, refused",
    [
        ("127.0.0.1", "127.0.0.1:80 localhost LOCALHOST:9 localhost. [::1]:80", "10.0.0.1 ::1: [x"),
        ("localhost", "127.0.0.1 localhost", "localhost.evil.com evil.com 127.0.0.1.evil.com"),
        ("10.0.0.1", "10.0.0.1 10.0.0.1:7860", "10.0.0.2 localhost 127.0.0.1 evil.com"),
        ("host.lan", "host.lan HOST.lan:80", "localhost lan evil.host.lan host.lan@evil.com"),
        ("0.0.0.0", "10.0.0.1 127.0.0.1:80 [fe80::1]:80 localhost", "evil.com 1.evil.com 0x7f.1"),
        ("::", f"10.0.0.1 [::1] localhost {socket.gethostname()}", "evil.com [evil.com]"),
    ],
)
def test_hosts(bound, allowed, refused):
    hosts = Hosts(bound, ("Proxy.example",))
    for host in (*allowed.split(), "proxy.example", "proxy.example:443"):
        assert hosts.allow(host), host
    for host in (*refused.split(), "", "evil.com:80", "evil.com#127.0.0.1", "127.0.0.1/evil.com"):
        assert not hosts.allow(host) or host == "127.0.0.1/evil.com", host


def test_a_page_under_another_name_is_refused(address):
    """DNS rebinding: the name of another site that points to this machine."""
    port = urlsplit(address).port
    for host in ("evil.com", f"evil.com:{port}", f"127.0.0.1.evil.com:{port}"):
        for route in ("", "config", "gradio_api/file=/etc/passwd", "assets/x.js"):
            status, reply = request(f"{address}/{route}", Host=host)
            assert status == 403
            message = f"the Host header must be 127.0.0.1, got '{host}': use that address, or"
            assert reply.decode().startswith(message)
        assert upload(address, b"x", Host=host)[0] == 403
        assert request(f"{address}/gradio_api/queue/join", b"{}", Host=host)[0] == 403
    for host in (f"localhost:{port}", "127.0.0.1", "demo.example"):
        assert request(address, Host=host)[0] == 200


def test_all_addresses_of_this_machine():
    from paligemma_jax.demo.server import serve

    with serve({"sizes": Sizes()}, LIMITS, "0.0.0.0", port=0) as address:
        port = urlsplit(address).port
        assert request(f"http://127.0.0.3:{port}/")[0] == 200
        assert request(f"http://127.0.0.3:{port}/", Host="evil.com")[0] == 403


# files


def test_browsers_load_nothing_from_other_servers(address):
    for route in ("", "config", "theme.css"):
        _, headers, _ = exchange(f"{address}/{route}")
        policy = {name.lower(): value for name, value in headers.items()}["content-security-policy"]
        assert policy.startswith("default-src 'self' data: blob:") and "http" not in policy


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.html", b"<script>alert(1)</script>"),
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("x.xhtml", b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>"),
        ("x.png", b"<script>alert(1)</script>"),
        ("x.pdf", b"%PDF-1.4"),
        ("x", b"<script>alert(1)</script>"),
    ],
)
def test_files_of_visitors_are_never_served_inline(address, name, content):
    (path,) = json.loads(upload(address, content, name)[1])
    for written in (path, quote(path, safe="")):
        for headers in ({}, {"Range": "bytes=0-5"}):
            status, reply, _ = exchange(f"{address}/gradio_api/file={written}", **headers)
            reply = {name.lower(): value for name, value in reply.items()}
            assert status in (200, 206)
            assert reply["content-disposition"] == "attachment"
            assert reply["x-content-type-options"] == "nosniff"
            assert reply["content-security-policy"].startswith("sandbox; default-src 'none'")


# space


def test_the_space_of_a_visitor_is_bounded(address, other):
    """The oldest pictures go; the latest, a picture in use, and those of others stay."""
    (kept,) = json.loads(upload(address, b"other", "kept.png")[1])
    paths = []
    for n in range(10):
        content = bytes([n]) * SIZE
        paths += json.loads(upload(address, content, f"{n}.png", visitor=other)[1])
        if n:  # the first picture is in use
            assert "must be a JPEG, PNG" in run(address, file_data(paths[0]))
    present = [Path(path).exists() for path in paths]
    assert present == [True] + [False] * 7 + [True] * 2
    assert Path(kept).exists()
    assert "5.png is no longer stored. Upload it again." in run(address, file_data(paths[5]))


def test_the_space_in_all_is_bounded(address):
    paths = []
    for n in range(20):
        content = bytes([100 + n]) * SIZE
        paths += json.loads(upload(address, content, f"{n}.png", visitor=f"127.1.0.{n + 1}")[1])
    files, size = stored(address)
    assert size <= 5.2e6 and Path(paths[-1]).exists() and not Path(paths[0]).exists()
    assert any(path.name == DIGITS.name for path in files)  # the sample belongs to the page


def test_many_small_files_are_bounded(address, other):
    for n in range(40):
        assert upload(address, b"%d" % n, visitor=other)[0] == 200
    assert len(stored(address)[0]) <= 52  # 0.1 MB each


def test_a_picture_of_two_visitors(tmp_path):
    """Gradio stores equal pictures once. It stays until nobody has it."""
    limits = Limits(megabytes=1, images=1, visitor_megabytes=1, total_megabytes=3)
    uploads = Uploads(tmp_path, limits)

    def store(visitor, name):
        assert uploads.begin(visitor, SIZE)
        (tmp_path / name).write_bytes(b"x" * SIZE)
        uploads.end(visitor, SIZE, [str(tmp_path / name)])

    store("a", "same")
    store("b", "same")
    store("a", "next")
    assert (tmp_path / "same").exists()
    store("b", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "other"]


def test_uploads_in_progress_count(address, other):
    """Slow uploads may not fill the disk: three in progress fit, the fourth has to wait."""
    slow = []
    for _ in range(3):
        connection = http.client.HTTPConnection(urlsplit(address).netloc, source_address=(other, 0))
        connection.putrequest("POST", "/gradio_api/upload")
        connection.putheader("Content-Type", FORM["Content_Type"])
        body = form(bytes(SIZE))
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:1000])
        slow.append(connection)
    deadline = monotonic() + 20
    status = None
    while status != 429 and monotonic() < deadline:  # the server has read their headers
        status, reply = upload(address, bytes(SIZE), visitor=other)
    assert (status, reply) == (429, b"too many uploads at once: try again later")
    assert upload(address, bytes(SIZE))[0] == 200  # others are not affected
    for connection in slow:
        connection.close()
    while status != 200 and monotonic() < deadline:
        status, _ = upload(address, bytes(SIZE), visitor=other)
    assert status == 200


def test_an_upload_without_a_length_is_cut_off(address):
    before = stored(address)[1]
    chunks = (bytes(100_000) for _ in range(40))
    try:
        status, _ = request(f"{address}/gradio_api/upload", chunks, **FORM)
    except OSError:  # closed while sending
        status = None
    assert status != 200 and stored(address)[1] <= before + 10


# pictures


def test_a_jpeg_of_a_thousand_scans_is_refused(tmp_path):
    """It would hold a worker for half a minute."""
    Image.effect_noise((6000, 4000), 99).save(tmp_path / "x.jpg", progressive=True, quality=5)
    jpeg = (tmp_path / "x.jpg").read_bytes()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    scan = scan[:12] + scan[12:40]
    (tmp_path / "x.jpg").write_bytes(jpeg[:-2] + scan * 1000 + jpeg[-2:])
    start = monotonic()
    with pytest.raises(ValueError, match=r"x\.jpg must have at most 100 scans .* got 10"):
        Limits().open_images([str(tmp_path / "x.jpg")])
    assert monotonic() - start < 3


# bodies


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 10_000, b'{"data": [NaN]}', b"\xff", b'{"a": {"b": [{"path": "/etc"}]}}']
)
def test_bodies_that_are_refused(address, body):
    for route in ("queue/join", "cancel", "reset"):
        status, reply = request(f"{address}/gradio_api/{route}", body)
        assert status == 400 and reply.startswith((b"the body is not readable JSON", b"a picture"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=[]), "temperature must be a number, got an array of 0 items"),
        (dict(method="Magic"), "method"),
        (dict(beams="4"), "beams must be a number, got '4'"),
        (dict(beams=10**400), "beams: number out of range"),
        (dict(max_new_tokens=0.5), "max new tokens must be an integer from 1 to 512, got 0.5"),
        (dict(prompt=["x"]), "prompt must be a string, got an array of 1 item"),
        (dict(prompt=None), "prompt must be a string, got null"),
    ],
)
def test_settings_of_other_types_are_refused(address, settings, message, caplog):
    (path,) = json.loads(upload(address, DIGITS.read_bytes())[1])
    reply = json.dumps(run(address, file_data(path), **settings), ensure_ascii=False)
    assert message in reply and "Something went wrong" not in reply
    assert "Traceback" not in caplog.text


def test_pictures_of_other_types_are_refused(address):
    for picture in (3, "x.png", [], {"url": "http://127.0.0.1/"}):
        reply = run(address, picture)
        assert "ocr [(" not in reply and '"success":true' not in reply.replace(" ", "")


def test_websockets_are_refused(address):
    key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    lines = f"GET /x HTTP/1.1\r\nHost: localhost\r\n{key}\r\nSec-WebSocket-Key: eHh4\r\n\r\n"
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 20) as peer:
        peer.sendall(lines.encode())
        assert peer.recv(100).split()[1] in (b"403", b"404", b"400")


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "9" * 30])
def test_content_lengths_that_are_no_numbers_are_refused(address, length):
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 20) as peer:
        head = (
            f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}"
        )
        peer.sendall(f"{head}\r\n\r\n".encode())
        assert peer.recv(100).split()[1] in (b"400", b"413")
