"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

JsonObject = dict[str, Any]  # values of any JSON type

KINDS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


MAX_MESSAGE = 500  # characters


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """One line of at most `limit` characters, safe in a log and in a terminal."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * limit]
    )
    return line if len(line) <= limit and len(text) <= 2 * limit else f"{line[: limit - 4]} ..."


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        message: One sentence.
        code: A short name of the error, for programs.
        param: The field of the request that it is about.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(printable(message))
        self.status, self.code, self.param = int(status), code, param

    @property
    def headers(self) -> dict[str, str]:
        """Clients may try again after a second if the server is busy."""
        if self.status == HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        is_busy = self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        return {"Retry-After": "1"} if is_busy else {}

    def body(self) -> JsonObject:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status, default)
        error = dict(message=str(self), type=kind, param=self.param, code=self.code)
        return {"error": error}


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", "stopping")


def engine_failed(status: int = 503) -> ApiError:
    return ApiError(status, "the engine failed: see the server's log", "failed")
