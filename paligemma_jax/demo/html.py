"""Answers as HTML. Whatever comes from a model, a file or a visitor is escaped."""

from __future__ import annotations

from html import escape

from paligemma_jax.demo.ask import Shown

WAITING = '<div class="answer waiting" aria-busy="true"><span></span><span></span><span></span></div>'
NOTHING = '<div class="answer nothing">The answer appears here.</div>'


def answer(shown: Shown) -> str:
    """The text so far, with a cursor until it is done; or the sentence of an error."""
    if shown.error:
        return f'<div class="answer failed" role="alert">{escape(shown.error)}</div>'
    if not shown.text and not shown.done:
        return WAITING
    text = escape(shown.text) if shown.text else "<i>no words</i>"
    return f'<div class="answer" aria-live="polite">{text}{"" if shown.done else "<b class=cursor></b>"}</div>'


def header(names: list[str]) -> str:
    return f"<header><h1>PaliGemma 2</h1><p>{' and '.join(f'<code>{escape(one)}</code>' for one in names)}</p></header>"


def name(text: str) -> str:
    return f'<div class="model">{escape(text)}</div>'
