"""The names under which a server may be reached."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit

from paligemma_jax.serving.asgi import Refusal

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
WILDCARDS = {"0.0.0.0", "::"}


@dataclass(frozen=True)
class Hosts:
    """The names under which a server may be reached.

    Any site can let its name point to this server, and its scripts could then read the replies
    ("DNS rebinding"). The Host header gives it away. Numeric addresses are safe.
    """

    bound: str
    """The address that the server is bound to."""
    others: tuple[str, ...] = ()
    """Further names, such as that of a proxy."""

    def allow(self, header: str) -> bool:
        """Whether a Host header is allowed, with any port."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        names = {name.lower() for name in (self.bound, *self.others)}
        if self.bound in WILDCARDS:
            return name in names | LOOPBACK | {gethostname().lower()} or _is_address(name)
        return name in (names | LOOPBACK if self.bound in LOOPBACK else names)

    def check(self, header: str) -> None:
        """Raise Refusal unless a Host header is allowed."""
        if not self.allow(header):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"the Host header must be {self.bound}, got {header[:100]!r}: "
                "use that address, or allow the name with --hosts",
            )


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False
