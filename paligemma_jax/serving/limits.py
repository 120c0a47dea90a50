"""Limits of a server. Nothing here imports jax, so that --help is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

# Least values of flags; 0 for the others. A limit of 0 bytes, seconds or tokens has no use.
LEAST = dict(rows=1, characters=1, new_tokens=1, choices=1)
ABOVE_ZERO = {
    "request_megabytes",
    "total_megabytes",
    "seconds",
    "upload_seconds",
    "megabytes",
    "megapixels",
    "fetch_seconds",
}
MOST = 10**9


def check_limits(limits: object, prefix: str = "") -> None:
    """Raise ValueError for a negative, infinite or missing number.

    Args:
        limits: One of the dataclasses below.
        prefix: What its flags begin with, such as "max.".
    """
    for entry in fields(limits):  # type: ignore[arg-type]
        value, least = getattr(limits, entry.name), LEAST.get(entry.name, 0)
        is_open = entry.name in ABOVE_ZERO
        if math.isfinite(value) and least <= value <= MOST and not (is_open and value == 0):
            continue
        bound = "above 0" if is_open else f"at least {least}"
        name = f"--{prefix}{entry.name}".replace("_", "-")
        raise ValueError(f"{name} must be {bound} and at most {MOST}, got {value}")


@dataclass(frozen=True)
class ServingLimits:
    """Limits on requests, which refuse overload early and bound the memory."""

    queue: int = 256
    """Maximum number of answers that wait for a row; further requests get status 429."""
    request_megabytes: float = 100.0
    """Maximum size of a request, in MB."""
    total_megabytes: float = 1000.0
    """Maximum size of all open requests, in MB; further ones get status 429."""
    seconds: float = 120.0
    """Maximum time of a request in seconds, including its wait; then it gets status 503."""
    upload_seconds: float = 30.0
    """Maximum time to send a request, in seconds."""
    drain_seconds: float = 30.0
    """Time that open requests get to finish when the server is stopped, in seconds."""


@dataclass(frozen=True)
class EngineShape:
    """The size of the running batch."""

    rows: int = 16
    """Number of answers that are decoded together."""
    cache_gib: float = 0.0
    """Memory for the key-value cache in GiB, which then sets the number of rows; 0 uses
    --rows."""
    slots: int = 0
    """Size of a row in tokens, for prompt and answer; 0 has room for a picture, 256 tokens of text
    and the longest answer."""
    kept_images: int = 64
    """Number of recent pictures whose features stay in memory."""


@dataclass(frozen=True)
class ChatLimits:
    """Limits on what a request may ask for."""

    characters: int = 10_000
    """Maximum length of the prompt, in characters."""
    new_tokens: int = 1024
    """Maximum length of an answer, in tokens."""
    choices: int = 16
    """Maximum number of answers to a prompt (n)."""


@dataclass(frozen=True)
class PictureLimits:
    """Limits on the pictures of a request, checked before one is decoded."""

    megabytes: float = 10.0
    """Maximum file size of a picture, in MB."""
    megapixels: float = 50.0
    """Maximum size of a decoded picture, in megapixels."""
    images: int = 8
    """Maximum number of pictures per prompt."""
    fetch_seconds: float = 10.0
    """Maximum time to fetch a picture from a URL, in seconds."""
