"""Checks of user errors: a ValueError in Python, and the same line on the command line."""

from __future__ import annotations

from functools import cache

import pytest
from support.paths import GOLDEN

import paligemma_jax as pg

IMAGE = GOLDEN / "image.png"


def check_message(text: str, parts) -> None:
    """One short line that contains all of `parts` and nothing of Python's internals."""
    assert "\n" not in text and len(text) < 500, text
    assert all(part in text for part in parts), text
    internals = ("Traceback", "NoneType", "KeyError", "object at 0x")
    assert not any(word in text for word in internals), text


def check_refused(command, parts, source, **options) -> None:
    """`load` raises a ValueError that contains `parts`, and the command prints the same."""
    with pytest.raises(ValueError) as error:
        pg.load(source, **options)
    check_message(str(error.value), parts)
    flags = [f"--{key}={value}" for key, value in options.items()]
    arguments = ("--model", source, "--image", IMAGE, "--prompt", "caption en", *flags)
    code, out, err = command("generate", *arguments)
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


@cache
def predictor() -> pg.Predictor:
    return pg.load(GOLDEN / "pg2")
