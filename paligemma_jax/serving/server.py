"""The HTTP server: uvicorn, with a stop that lets open requests finish."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, Timer
from types import FrameType

import uvicorn

from paligemma_jax.serving.app import make_app
from paligemma_jax.serving.errors import stopping
from paligemma_jax.serving.protocol import Protocol
from paligemma_jax.serving.service import Service

KEEP_ALIVE = 30  # seconds that an idle connection stays open
CLOSE = 5  # seconds for replies after the last answer was cut


class Server(uvicorn.Server):
    """A server of one service."""

    def __init__(self, service: Service, sockets: list[socket.socket]):
        self.service, self.bound = service, sockets
        config = uvicorn.Config(
            make_app(service),
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(service.limits.drain_seconds + CLOSE),
        )
        super().__init__(config)
        for listening in sockets:
            listening.listen()  # clients wait from now on

    def run_until_stopped(self) -> None:
        """Serve until SIGINT or SIGTERM, or `handle_exit`."""
        self.run(sockets=self.bound)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests, let the open ones finish for a while, then end them with an
        error."""
        logging.getLogger("paligemma_jax.serving").info("stopping")
        self.service.drain()
        timer = Timer(self.service.limits.drain_seconds, self.service.worker.fail, [stopping()])
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A bound socket. ValueError if the port, that of a flag, is in use or not permitted."""
    if not host:
        raise ValueError("--host must be an address, such as 127.0.0.1, or 0.0.0.0 for all of them")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(
                f"--host must be an address of this machine, got {host!r} ({reason})"
            ) from None
        raise ValueError(
            f"port {port} on {host} is in use or not permitted ({reason}): choose another one "
            f"with {flag} (0 picks a free port)"
        ) from None
    return listening


def address_of(listening: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def log_to_stderr() -> None:
    """Log requests, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("paligemma_jax.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)


@contextmanager
def serving(service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread inside a `with` block, and yield the address."""
    listening = bind(host, port)
    server = Server(service, [listening])
    thread = Thread(target=server.run_until_stopped, daemon=True)
    thread.start()
    try:
        yield address_of(listening)
    finally:
        server.should_exit = True
        thread.join()
