"""Fetch a picture from another server, within limits, and never from this network.

A name is looked up once, its addresses are checked, and the connection goes to the address that was
checked: a name server that answers differently the second time gains nothing (DNS rebinding).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import IPv6Address, IPv6Network, ip_address
from threading import Timer
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"Accept": "image/*", "User-Agent": "paligemma-jax"}
CHUNK = 64_000  # bytes
NAT64 = IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48")  # an IPv4 address inside


def download(url: str, limit: int, seconds: float) -> bytes:
    """Fetch a file of at most `limit` bytes over http or https.

    Args:
        seconds: Time for all of it, redirects included.

    Raises:
        ValueError: The URL is not valid, its host is in a private network, or the file is too
            large, too slow or missing.
    """
    deadline, shown = time.monotonic() + seconds, url[:100]
    for _ in range(1 + MAX_REDIRECTS):
        parts = _split(url)
        with _errors(shown, seconds, deadline), _request(parts, deadline) as reply:
            if reply.status in REDIRECTS:
                url = urljoin(url, reply.headers.get("Location", ""))
                continue
            if reply.status != 200:
                raise ValueError(f"{shown} must answer with a picture, got status {reply.status}")
            return _read(reply, shown, limit, deadline)
    raise ValueError(f"{shown} must redirect at most {MAX_REDIRECTS} times")


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, as is any address inside it."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or any(ip in net for net in NAT64):
            return False
    return ip.is_global and not ip.is_multicast


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username or any(c <= " " or c == "\x7f" for c in url):
        raise ValueError(f"a URL must be like https://example.org/a.jpg, got {url[:100]!r}")
    return parts


@contextmanager
def _errors(shown: str, seconds: float, deadline: float) -> Iterator[None]:
    """Turn errors of the network into one sentence."""
    try:
        yield
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() > deadline:
            raise ValueError(f"{shown} must be fetched within {seconds:g} s") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{shown} cannot be fetched: {reason}") from None


@contextmanager
def _request(parts: SplitResult, deadline: float) -> Iterator[http.client.HTTPResponse]:
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = _connect(host, port, is_secure, deadline)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # A timeout of the socket is for each read, and a server may send a byte at a time.
    timer = Timer(_left(deadline), connection.sock.shutdown, [socket.SHUT_RDWR])
    timer.start()
    try:
        connection.request(
            "GET", path, headers={"Accept": "image/*", "User-Agent": "paligemma-jax"}
        )
        with closing(connection.getresponse()) as reply:
            yield reply
    finally:
        timer.cancel()
        connection.close()


def _connect(host: str, port: int, is_secure: bool, deadline: float) -> socket.socket:
    """Connect to a public address of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError(f"a URL must not be of a private or local network, got the host {host!r}")
    plain = socket.create_connection((addresses[0], port), timeout=_left(deadline))
    if not is_secure:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _read(reply: http.client.HTTPResponse, shown: str, limit: int, deadline: float) -> bytes:
    content = bytearray()
    while True:
        part = reply.read1(CHUNK)
        _left(deadline)
        if not part:
            return bytes(content)
        content += part
        if len(content) > limit:
            raise ValueError(f"{shown} must be at most {limit / 1e6:g} MB")


def _left(deadline: float) -> float:
    """The seconds until a deadline. TimeoutError if it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
