"""Embed the pages of files into an index."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.retrieval.index import Index, Page
from paligemma_jax.retrieval.pages import list_pages, open_page

PART = 64  # pages in a part of the index, which a stopped run embeds again


def embed_files(
    index: Index, paths: Iterable[str | Path], batch_size: int = 8
) -> tuple[int, dict[str, str]]:
    """Add the pages of files to an index. Pages that it has are left out.

    Returns:
        The number of pages added, and why the others cannot be read, by page.

    Raises:
        ValueError: A path does not exist.
    """
    pages, errors = list_pages(paths)
    known = set(index.pages)
    new = [page for page in dict.fromkeys(pages) if page not in known]
    added = 0
    bar = progress_bar(desc="embed", total=len(new), unit="page")
    with ThreadPoolExecutor(4) as threads, bar:
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            opened = dict(zip(part, threads.map(_try_open, part), strict=True))
            errors |= {str(page): x for page, x in opened.items() if isinstance(x, str)}
            images = {page: x for page, x in opened.items() if not isinstance(x, str)}
            if images:
                vectors = index.retriever.embed_pages(list(images.values()), batch_size)
                index.add(list(images), vectors)
                added += len(images)
            bar.update(len(part))
    return added, errors


def _try_open(page: Page) -> Image.Image | str:
    """The picture of a page, or why it cannot be read."""
    try:
        return open_page(page)
    except ValueError as error:
        return str(error)
