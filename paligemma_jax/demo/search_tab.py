"""The tab that searches pages, and its events."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import gradio as gr
import msgspec

from convert.typed_json import check
from paligemma_jax.demo import html
from paligemma_jax.demo.ask import Reply, error_message
from paligemma_jax.demo.events import Options, Updates, Upload
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.search import Searcher


class Search(msgspec.Struct):
    """The inputs of a search, as the browser sends them."""

    pages: list[Upload] | None
    query: str

    @classmethod
    def decode(cls, pages: object, query: object) -> Search:
        try:
            return check(dict(pages=pages, query=query), cls)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None


def search_tab(searcher: Searcher, limits: Limits, queue: Options) -> None:
    """Lay out the tab, and attach its handler with the options of the queue."""
    with gr.Row(elem_id="search-row"):
        query = gr.Textbox(
            show_label=False,
            placeholder="What to look for",
            max_lines=2,
            elem_id="query",
            scale=5,
            container=False,
        )
        button = gr.Button("Search", variant="primary", min_width=90, elem_id="search")
    message = gr.HTML(html.search_invitation(searcher.pages), elem_id="message")
    gallery = gr.Gallery(
        show_label=False,
        visible=False,
        columns=3,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="found",
    )
    pages = gr.File(
        label=f"Your pages (at most {limits.pages} pictures)",
        file_count="multiple",
        file_types=["image"],
        height=180,
        elem_id="pages",
    )
    gr.on(
        [button.click, query.submit],
        partial(_search, searcher, limits),
        [pages, query],
        [message, gallery],
        preprocess=False,  # `Limits` checks the pictures before they are decoded
        show_progress="hidden",
        **queue,
    )


def _search(searcher: Searcher, limits: Limits, pages: object, query: object) -> Iterator[Updates]:
    """Show the progress, then the best pages or an error."""
    request = Search.decode(pages, query)
    files = [upload.path for upload in request.pages or []]
    hidden = gr.update(visible=False, value=None)
    try:
        limits.check_prompt(request.query)
        yield [html.WAITING, hidden]
        for number in searcher.embed(files, limits):
            yield [html.progress(f"Reading page {number + 1} of {len(files)}"), hidden]
        found = searcher.find(files, request.query, limits)
    except Exception as error:
        yield [html.answer(Reply(done=True, error=error_message(error))), hidden]
        return
    pictures = [(page.picture, page.caption) for page in found]
    total = len(files) + searcher.pages
    yield [html.found(len(found), total), gr.update(visible=True, value=pictures)]
