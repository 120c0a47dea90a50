"""."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def report_errors(run: Callable[[], None]) -> None:
    """Runs it; what a user can mend is one line on stderr, and exit code 2."""
    try:
        try:
            run()
        finally:
            sys.stdout.flush()  # here, so that a closed pipe shows while it can still be caught
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:  # the reader, as in `| head`, has had enough: not even the flush at exit may complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        _stop(reason, 2)


def _reason(error: Exception) -> str | None:
    """What to tell of an error that its user can mend; None for any other, whose traceback is worth having."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: give fewer images at once, fewer new tokens, --dtype bfloat16 or a smaller checkpoint"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if isinstance(error, ImportError | RuntimeError) and "jaxlib" in str(error):  # told when jax is imported
        return f"jax and jaxlib do not fit ({str(error).splitlines()[0]}): pip install --upgrade paligemma-jax, with the extra of your accelerator"
    if isinstance(error, AssertionError | RuntimeError) and "jax" in sys.modules:
        from paligemma_jax.sharding import devices

        try:
            devices.check_devices()
        except ValueError as missing:
            return str(missing)
    return str(error) if isinstance(error, ValueError) else None


def _stop(reason: str, code: int) -> None:
    print(f"paligemma-jax: {reason}", file=sys.stderr)
    raise SystemExit(code) from None
