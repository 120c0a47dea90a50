"""The command `paligemma-jax`: a subcommand is a function of `commands/`. Errors of the user are one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
import sys

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
from paligemma_jax.errors import report_errors

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
    report_errors(lambda: _help(arguments) if arguments in (["--help"], ["-h"]) else _dispatch(arguments))




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




