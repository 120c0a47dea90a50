"""Answers as HTML. Text from a model, a file or a visitor is always escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from paligemma_jax.demo.ask import Reply
from paligemma_jax.demo.tokens import Token
from paligemma_jax.processing.locations import Detection

WAITING = (
    '<div class="answer waiting" aria-busy="true"><span></span><span></span><span></span></div>'
)
EMPTY = '<span class="empty">(empty answer)</span>'
INVITATION = """<div class="invitation"><h2>Ask about the picture</h2>
<p>Choose a task or write a prompt, then press Run. The answer appears here.</p>
<p>Or try an example with the sample picture:</p></div>"""


def search_invitation(pages: int) -> str:
    """Return the text in place of the first results."""
    number = "1 page" if pages == 1 else f"{pages:,} pages"
    server = f"The server has {number}. Add your own below"
    here = server if pages else "Add pictures of pages below"
    return f"""<div class="invitation boxed"><h2>Search pages by what they show</h2>
<p>{here}, write what to look for, and press Search.</p></div>"""


def progress(text: str) -> str:
    """Return a line about work that goes on."""
    return f'<p class="status" aria-live="polite">{escape(text)}<b class=cursor></b></p>'


def found(count: int, total: int) -> str:
    """Return the line above the results."""
    pages = "1 page" if total == 1 else f"{total:,} pages"
    return f'<p class="status" aria-live="polite">The best {count} of {pages}, with scores</p>'


def answer(reply: Reply) -> str:
    """Return the answer so far, or the error.

    A cursor follows an unfinished answer. Finished detections are shown by label and score, with
    the text and its `<loc>` tokens folded away.
    """
    if reply.error:
        return f'<div class="answer failed" role="alert">{escape(reply.error)}</div>'
    if not reply.text.strip() and not reply.done:
        return WAITING
    text = escape(reply.text) if reply.text.strip() else EMPTY
    if reply.detections and reply.done:
        raw = f"<details><summary>raw output</summary><code>{text}</code></details>"
        text = " ".join(map(_chip, reply.detections)) + raw
    elif "<loc" in reply.text:
        text = f"<code>{text}</code>"
    cursor = "" if reply.done else "<b class=cursor></b>"
    return f'<div class="answer" aria-live="polite">{text}{cursor}</div>'


def _chip(detection: Detection) -> str:
    """Return the label of a box and its score."""
    score = "" if detection.score is None else f" <small>{detection.score:.2f}</small>"
    return f"<span class=detected>{escape(detection.label or 'object')}{score}</span>"


def tokens(answer_tokens: Sequence[Token]) -> str:
    """Return one chip per token: its text and probability, and the alternatives below."""
    return f'<div class="tokens">{"".join(map(_token, answer_tokens))}</div>'


def _token(token: Token) -> str:
    alternatives = "".join(
        f"<li><span>{_visible(text)}</span> <i>{probability:.0%}</i></li>"
        for text, probability in token.alternatives
        if probability >= 0.005
    )
    title = f"<b>{_visible(token.text)}</b> <i>{token.probability:.0%}</i>"
    style = f"--p:{token.probability:.3f}"
    return f'<div style="{style}"><p>{title}</p><ul>{alternatives}</ul></div>'


def _visible(text: str | None) -> str:
    if text is None:
        return "<em>end</em>"
    return escape(text).replace(" ", "␣").replace("\n", "⏎") or "∅"


def header(names: Sequence[str]) -> str:
    models = " and ".join(f"<code>{escape(name)}</code>" for name in names)
    return f"<header><h1>PaliGemma 2</h1><p>{models}</p></header>"


def model_name(name: str) -> str:
    return f'<div class="model">{escape(name)}</div>'
