"""Grammars as text, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paligemma_jax.grammars.grammar import Boxes, Choices, Grammar, Masks
from paligemma_jax.grammars.guidance import Json, Regex


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _json(file: str) -> Json:
    if not file:
        return Json()
    if not Path(file).is_file():
        raise ValueError(f"json:{file} must name the file of a JSON schema: no such file")
    return Json(Path(file).read_text(encoding="utf-8"))


FORMS: dict[str, Callable[[str], Grammar | Json | Regex]] = {
    "boxes": lambda text: Boxes(_names(text)),
    "masks": lambda text: Masks(_names(text)),
    "choices": lambda text: Choices(_names(text)),
    "json": _json,
    "regex": Regex,
}


def parse_grammar(text: str) -> Grammar | Json | Regex:
    """Return the grammar of a text: boxes:cat,dog, masks:cat, choices:yes,no, json,
    json:SCHEMA.json or regex:PATTERN.

    Raises:
        ValueError: The text has no such form.
    """
    form, _, rest = text.partition(":")
    if form not in FORMS or (not rest and form != "json"):
        raise ValueError(
            "a grammar must be boxes:LABELS, masks:LABELS, choices:TEXTS (comma-separated), json, "
            f"json:SCHEMA.json or regex:PATTERN, got {text!r}"
        )
    return FORMS[form](rest)
