"""The command `paligemma-jax`. Each subcommand is a function in `commands/`."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator

import docstring_parser
import tyro

from paligemma_jax.commands.annotations import convert_annotations
from paligemma_jax.commands.bench import bench
from paligemma_jax.commands.convert import convert, inspect
from paligemma_jax.commands.demo import demo
from paligemma_jax.commands.evaluate import evaluate
from paligemma_jax.commands.finetune import finetune
from paligemma_jax.commands.generate import generate
from paligemma_jax.commands.parity import parity
from paligemma_jax.commands.plan import plan
from paligemma_jax.commands.predict import predict
from paligemma_jax.commands.recipe import recipe
from paligemma_jax.commands.retrieval import embed, search
from paligemma_jax.commands.scoreboard import scoreboard
from paligemma_jax.commands.serve import serve
from paligemma_jax.errors import report_errors

COMMANDS = {
    "generate": generate,
    "finetune": finetune,
    "plan": plan,
    "predict": predict,
    "evaluate": evaluate,
    "recipe": recipe,
    "scoreboard": scoreboard,
    "annotations": convert_annotations,
    "embed": embed,
    "search": search,
    "serve": serve,
    "demo": demo,
    "bench": bench,
    "parity": parity,
    "convert": convert,
    "convert inspect": inspect,
}
ABOUT = "PaliGemma 2 in JAX: generate, fine-tune, evaluate, search, serve, convert."


def main(arguments: list[str] | None = None) -> None:
    """Run the subcommand in `arguments`, by default sys.argv; without one, print the help."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments[:2] == ["convert", "inspect"]:
        arguments = ["convert inspect", *arguments[2:]]
    run = _print_help if arguments in (["--help"], ["-h"]) else _dispatch
    report_errors(lambda: run(arguments))


def _dispatch(arguments: list[str]) -> None:
    with _joined_help_lines():
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="paligemma-jax",
            description=ABOUT,
            args=arguments,
            config=(tyro.conf.DisallowNone,),
        )


def _print_help(arguments: list[str]) -> None:
    """Print tyro's help with COMMAND in place of the list of all subcommands in the usage line,
    which would not fit 80 columns."""
    output = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding)
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        _dispatch(arguments)
    output.seek(0)
    print(re.sub(r"\{generate,.*\}", "COMMAND", output.read(), count=1), end="")


@contextlib.contextmanager
def _joined_help_lines() -> Iterator[None]:
    """Let tyro wrap help texts to the terminal; by default it keeps the docstrings' line breaks."""
    originals = docstring_parser.parse, docstring_parser.parse_from_object
    docstring_parser.parse, docstring_parser.parse_from_object = map(_joining, originals)
    try:
        yield
    finally:
        docstring_parser.parse, docstring_parser.parse_from_object = originals


def _joining(parse: Callable) -> Callable:
    """Return a docstring parser that joins the lines of each paragraph."""

    def parse_and_join(source: object) -> docstring_parser.Docstring:
        docstring = parse(source)
        for parameter in docstring.params:
            paragraphs = re.split(r"\n\s*\n", parameter.description or "")
            parameter.description = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        return docstring

    return parse_and_join
