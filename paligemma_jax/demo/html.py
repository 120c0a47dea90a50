"""Answers as HTML. Whatever comes from a model, a file or a visitor is escaped."""

from __future__ import annotations

from collections import Counter
from html import escape

from paligemma_jax.demo.ask import Shown
from paligemma_jax.demo.tokens import Token

WAITING = '<div class="answer waiting" aria-busy="true"><span></span><span></span><span></span></div>'
NOTHING = '<div class="answer nothing">The answer appears here.</div>'


def answer(shown: Shown) -> str:
    """The text so far, with a cursor until it is done; what it points at in words, its `<loc>` behind a click; or the sentence of an error."""
    if shown.error:
        return f'<div class="answer failed" role="alert">{escape(shown.error)}</div>'
    if not shown.text and not shown.done:
        return WAITING
    text = escape(shown.text) if shown.text else "<i>nothing</i>"
    if shown.found and shown.done:
        counts = Counter(thing.label for thing in shown.found)
        things = " ".join(
            f"<span class=thing>{escape(label) or 'thing'}{f'<small> ×{n}</small>' if n > 1 else ''}</span>" for label, n in counts.items()
        )
        text = f"{things}<details><summary>as the model says it</summary><code>{text}</code></details>"
    elif "<loc" in shown.text:
        text = f"<code>{text}</code>"
    return f'<div class="answer" aria-live="polite">{text}{"" if shown.done else "<b class=cursor></b>"}</div>'


def tokens(found: list[Token]) -> str:
    """A chip a token: what was said and how likely it was, and below it what else it could have been."""
    return f'<div class="tokens">{"".join(map(_chip, found))}</div>'


def _chip(token: Token) -> str:
    others = "".join(f"<li><span>{_word(text)}</span> <i>{p:.0%}</i></li>" for text, p in token.others if p >= 0.005)
    return f'<div style="--p:{token.probability:.3f}"><p><b>{_word(token.text)}</b> <i>{token.probability:.0%}</i></p><ul>{others}</ul></div>'


def _word(text: str | None) -> str:
    return "<em>end</em>" if text is None else escape(text).replace(" ", "␣").replace("\n", "⏎") or "∅"


def header(names: list[str]) -> str:
    return f"<header><h1>PaliGemma 2</h1><p>{' and '.join(f'<code>{escape(one)}</code>' for one in names)}</p></header>"


def name(text: str) -> str:
    return f'<div class="model">{escape(text)}</div>'
