"""User errors. All of them are ValueErrors, and this is the one place that prints them.

Code raises ValueError for whatever a user can fix. `report_errors` turns it into one line on stderr
and exit code 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def report_errors(run: Callable[[], None]) -> None:
    """Run a command; print a user error as one line on stderr and exit with code 2.

    Nothing breaks if stdout or stderr is closed or its reader has left: output is dropped.
    """
    _replace_streams()
    try:
        with _one_line_warnings(), _flushed_output():
            run()
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader of stdout, such as `| head`, has left
        return
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        _exit(reason, 2)


class _LossyFile(io.FileIO):
    """A file that drops what it cannot write, so that a progress bar cannot end a run."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _replace_streams() -> None:
    """Open streams that are closed on /dev/null, before another file gets their number, and drop
    what cannot be written to stderr."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _discard(number)
            setattr(sys, name, _text_file(number))
    if sys.stderr is sys.__stderr__:  # not replaced by a notebook or a test
        sys.stderr = _text_file(2)


def _text_file(number: int) -> io.TextIOWrapper:
    file = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
    return io.TextIOWrapper(file, errors="backslashreplace", line_buffering=True)


def _discard(number: int) -> None:
    """Send what is written to a file descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)


@contextmanager
def _flushed_output() -> Iterator[None]:
    """Flush stdout at the end, so that what cannot be written raises here and not at exit."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            _discard(1)  # Python flushes again at exit
            raise type(error)(error.errno, error.strerror, "standard output") from None


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print the warnings of this project like its errors, without the line of code."""
    original = warnings.formatwarning

    def format_warning(message: Warning | str, category: type[Warning], *rest, **options) -> str:
        if category is UserWarning:
            return f"paligemma-jax: {message}\n"
        return original(message, category, *rest, **options)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = original


def _reason(error: Exception) -> str | None:
    """The message for a user error, or None for a bug."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory: use a smaller batch, fewer new tokens, --dtype bfloat16 or a smaller "
            "checkpoint"
        )
    if isinstance(error, OSError):
        has_file = error.filename and error.strerror
        return f"{error.filename}: {error.strerror}" if has_file else error.strerror or str(error)
    if isinstance(error, ImportError | RuntimeError) and "jaxlib" in str(error):
        return (  # raised by the import of jax
            f"jax and jaxlib have incompatible versions ({str(error).splitlines()[0]}): run "
            "pip install --upgrade paligemma-jax with the extra for your accelerator"
        )
    if isinstance(error, AssertionError | RuntimeError) and "jax" in sys.modules:
        return _missing_accelerator()
    return str(error) if isinstance(error, ValueError) else None


def _missing_accelerator() -> str | None:
    from paligemma_jax.sharding.devices import check_devices

    try:
        check_devices()
    except ValueError as missing:
        return str(missing)
    return None


def _exit(reason: str, code: int) -> None:
    print(f"paligemma-jax: {reason}", file=sys.stderr)
    raise SystemExit(code) from None
