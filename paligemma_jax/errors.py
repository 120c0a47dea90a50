"""User errors. All of them are ValueErrors, and this is the one place that prints them.

Code raises ValueError for whatever a user can fix. `report_errors` turns it into one line on stderr
and exit code 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def report_errors(run: Callable[[], None]) -> None:
    """Run a command; print a user error as one line on stderr and exit with code 2."""
    try:
        try:
            run()
        finally:
            sys.stdout.flush()  # so that a closed pipe raises here, where it is caught
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `| head`, has left; silence the flush at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        _exit(reason, 2)


def _reason(error: Exception) -> str | None:
    """The message for a user error, or None for a bug."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory: use a smaller batch, fewer new tokens, --dtype bfloat16 or a smaller "
            "checkpoint"
        )
    if isinstance(error, OSError):
        has_file = error.filename and error.strerror
        return f"{error.filename}: {error.strerror}" if has_file else str(error)
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
