"""The command `paligemma-jax`: a subcommand is a function of `commands/`. Errors of the user are one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable

import tyro

from paligemma_jax.commands.bench import bench
from paligemma_jax.commands.demo import demo
from paligemma_jax.commands.evaluate import evaluate
from paligemma_jax.commands.finetune import finetune
from paligemma_jax.commands.generate import generate
from paligemma_jax.commands.parity import parity
from paligemma_jax.commands.plan import plan
from paligemma_jax.commands.predict import predict
from paligemma_jax.commands.recipe import recipe

COMMANDS = {
    "generate": generate,
    "finetune": finetune,
    "plan": plan,
    "predict": predict,
    "evaluate": evaluate,
    "recipe": recipe,
    "demo": demo,
    "bench": bench,
    "parity": parity,
}


def main() -> None:
    """Runs what sys.argv asks for; alone, the command shows its help."""
    arguments = sys.argv[1:] or ["--help"]
    told(lambda: _help(arguments) if arguments in (["--help"], ["-h"]) else _dispatch(arguments))


def told(run: Callable[[], None]) -> None:
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


def _dispatch(arguments: list[str]) -> None:
    about = "PaliGemma 2 in JAX. Checkpoints are converted by `python -m convert`."
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="paligemma-jax", description=about, args=arguments, config=(tyro.conf.DisallowNone,))


def _help(arguments: list[str]) -> None:
    """What tyro shows, but for the names of all subcommands in the line of usage, which would not fit 80 columns; they are told below it."""
    shown = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding)
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _dispatch(arguments)
    shown.seek(0)
    print(re.sub(r"\{generate,.*\}", "COMMAND", shown.read(), count=1), end="")


def _reason(error: Exception) -> str | None:
    """What to tell of an error that its user can mend; None for any other, whose traceback is worth having."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: give fewer images at once, fewer new tokens, --dtype bfloat16 or a smaller checkpoint"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if isinstance(error, ImportError | RuntimeError) and "jaxlib" in str(error):  # told when jax is imported
        return f"jax and jaxlib do not fit ({str(error).splitlines()[0]}): pip install --upgrade paligemma-jax, with the extra of your accelerator"
    if isinstance(error, AssertionError | RuntimeError) and "jax" in sys.modules:
        from paligemma_jax import devices

        try:
            devices.check()
        except ValueError as missing:
            return str(missing)
    return str(error) if isinstance(error, ValueError) else None


def _stop(reason: str, code: int) -> None:
    print(f"paligemma-jax: {reason}", file=sys.stderr)
    raise SystemExit(code) from None
