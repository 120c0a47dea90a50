"""What ends an answer besides eos: texts, and functions of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from paligemma_jax.inference.sampling import is_integer

# The text so far -> whether the answer ends with it, or the length of the text to keep of it. The
# answer continues after False, None and a negative number (as of `str.find`).
StopFunction: TypeAlias = Callable[[str], bool | int | None]
Stop: TypeAlias = str | StopFunction
Stops: TypeAlias = Stop | Iterable[Stop]


def as_stops(stop: Stops | None) -> tuple[Stop, ...]:
    """The stop texts and functions as a tuple.

    Raises:
        ValueError: One is neither a non-empty text nor a function.
    """
    if stop is None:
        return ()
    if isinstance(stop, str) or callable(stop):
        stops = (stop,)
    else:
        stops = tuple(stop) if isinstance(stop, Iterable) else (None,)
    if not all((isinstance(stop, str) and stop) or callable(stop) for stop in stops):
        raise ValueError(
            "stop must be a non-empty text, a function of the text so far, or a list of them, "
            f"got {stop!r}"
        )
    return stops  # type: ignore[return-value]


def end_of_answer(text: str, settled: str, stops: Iterable[Stop]) -> int | None:
    """The length of the answer in `text`, up to the first stop; None if it continues.

    Args:
        settled: The start of the text that later tokens cannot change, which functions get.

    Raises:
        ValueError: A function fails or returns something else.
    """
    ends = [text.find(stop) if isinstance(stop, str) else _call(stop, settled) for stop in stops]
    return min((end for end in ends if end >= 0), default=None)


def _call(function: StopFunction, text: str) -> int:
    """The length of the text that a function keeps, or -1 if the answer continues."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        result = function(text)
    except Exception as error:
        message = f"the stop function {name} failed for the text {text!r}: {error!r}"
        raise ValueError(message) from error
    if result is None or isinstance(result, bool | np.bool_):
        return len(text) if result else -1
    if not is_integer(result) or result > len(text):
        raise ValueError(
            f"the stop function {name} must return True, False or a length up to {len(text)}, "
            f"got {result!r} for the text {text!r}"
        )
    return result
