"""`paligemma-jax embed` and `paligemma-jax search`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from paligemma_jax.commands.options import Base, Dtype, Mesh, dumps, flag

if TYPE_CHECKING:
    from paligemma_jax.retrieval.index import Index

Paths = Annotated[tuple[str, ...], tyro.conf.Positional, flag("PATH [PATH ...]")]
IndexPath = Annotated[str, tyro.conf.Positional, flag("INDEX")]
PUBLISHED = "vidore/colpali-v1.3-hf"
Queries = Annotated[tuple[str, ...], tyro.conf.Positional, flag("QUERY [QUERY ...]")]


def embed(
    paths: Paths,
    output: Annotated[str, flag("INDEX")],
    model: Annotated[str, flag("NAME")] = PUBLISHED,
    base: Base = None,
    dtype: Dtype = None,
    mesh: Mesh = None,
    batch_size: int = 8,
) -> None:
    """Embed pictures and the pages of PDFs into an index to search.

    Example: paligemma-jax embed scans/ report.pdf --output index

    Args:
        paths: Pictures, PDFs, and directories that contain them.
        output: Directory of the index. An index of the same model grows: pages that it has are
            not embedded again, so a stopped run continues.
        model: ColPali checkpoint or LoRA adapter: a directory or a hub id.
        base: Base checkpoint of an adapter, if it has moved.
        dtype: Dtype of parameters and activations.
        mesh: Devices to shard over: data=2,fsdp=4,tensor=2 (axes left out have size 1), or auto.
        batch_size: Number of pages to embed at a time.
    """
    from paligemma_jax.retrieval.embed import embed_files

    if not paths:
        raise ValueError("no pages: give pictures, PDFs or directories")
    index = _open(output, model, base, dtype, mesh)
    added, errors = embed_files(index, paths, batch_size)
    for page, error in errors.items():
        print(f"paligemma-jax: not embedded: {page}: {error}", file=sys.stderr)
    print(f"added {added} pages to {output}, which has {len(index.pages)}; {len(errors)} skipped")
    if not index.pages:
        raise ValueError(f"none of {', '.join(paths)} has a page that can be embedded")


def search(
    index: IndexPath,
    queries: Queries,
    model: Annotated[str, flag("NAME")] = PUBLISHED,
    base: Base = None,
    top: int = 5,
    dtype: Dtype = None,
    mesh: Mesh = None,
    json: bool = False,
) -> None:
    """Search an index of pages by text.

    Example: paligemma-jax search index "revenue by region"

    Args:
        index: Directory that `embed` made.
        queries: One text or several.
        model: The ColPali checkpoint or LoRA adapter that made the index.
        base: Base checkpoint of an adapter, if it has moved.
        top: Number of pages to list for each query.
        dtype: Dtype of parameters and activations.
        mesh: Devices to shard over: data=2,fsdp=4,tensor=2 (axes left out have size 1), or auto.
        json: Print one JSON object per page with query, file, page and score, instead of text.
    """
    from paligemma_jax.retrieval.index import INDEX

    if not queries:
        raise ValueError("no query: give at least one after the index")
    if not (Path(index) / INDEX).is_file():
        raise ValueError(f"{index} has no {INDEX}: make an index with paligemma-jax embed")
    found = _open(index, model, base, dtype, mesh).search(queries, top)
    for query, hits in zip(queries, found, strict=True):
        for hit in hits:
            page = hit.page
            record = {"query": query, "file": page.file, "page": page.number, "score": hit.score}
            print(dumps(record) if json else f"{hit.score:8.3f}  {page}")


def _open(
    directory: str, model: str, base: str | None, dtype: str | None, mesh: str | None
) -> Index:
    from convert.files import user_path
    from paligemma_jax.retrieval import retriever
    from paligemma_jax.retrieval.index import Index

    return Index(user_path(directory), retriever.load(model, dtype=dtype, mesh=mesh, base=base))
