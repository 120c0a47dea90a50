"""."""

from __future__ import annotations

from functools import cache

import pytest
from support.paths import GOLDEN

import paligemma_jax as pg

IMAGE = GOLDEN / "image.png"


def told(text: str, parts) -> None:
    """One line, short enough to be read, that says all of `parts`, and whose writer knew what they meant."""
    assert "\n" not in text and len(text) < 500 and all(part in text for part in parts), text
    assert not any(word in text for word in ("Traceback", "NoneType", "KeyError", "object at 0x")), text


def refused(command, parts, source, **options) -> None:
    """`load` raises a ValueError with `parts`, and the command says the same."""
    with pytest.raises(ValueError) as error:
        pg.load(source, **options)
    told(str(error.value), parts)
    flags = [f"--{key}={value}" for key, value in options.items()]
    code, out, err = command("generate", "--model", source, "--image", IMAGE, "--prompt", "caption en", *flags)
    assert (code, out, err) == (2, "", f"paligemma-jax: {error.value}\n")


@cache
def predictor() -> pg.Predictor:
    return pg.load(GOLDEN / "pg2")
