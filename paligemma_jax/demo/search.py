"""Find pages by text, among those of the server and those that a visitor uploaded."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.demo.ask import MAX_SIDE
from paligemma_jax.demo.limits import Limits
from paligemma_jax.retrieval.embed import embed_files
from paligemma_jax.retrieval.index import INDEX, Index, Page
from paligemma_jax.retrieval.pages import open_page
from paligemma_jax.retrieval.retriever import Embeddings, Retriever

TOP = 6  # pages to show
CACHED = 256  # uploads whose vectors are kept, of at most 0.5 MB each


@dataclass(frozen=True)
class Found:
    """A page that was found."""

    name: str
    score: float
    picture: Image.Image = field(repr=False)

    @property
    def caption(self) -> str:
        """The score and the name; a long name is cut off at its end."""
        return f"{self.score:.2f} {self.name}"


@dataclass
class Searcher:
    """Finds pages with a ColPali.

    Attributes:
        retriever: The model.
        index: The pages of the server, for all visitors; None for uploads only.
    """

    retriever: Retriever
    index: Index | None = None
    _vectors: OrderedDict[str, Embeddings] = field(default_factory=OrderedDict)

    @property
    def pages(self) -> int:
        """The number of pages of the server."""
        return len(self.index.pages) if self.index else 0

    def embed(self, files: Sequence[str], limits: Limits) -> Iterator[int]:
        """Embed the uploads that are not embedded yet; yields the number of those that are.

        Raises:
            ValueError: There are too many, or one exceeds a limit or cannot be decoded.
        """
        self._check_number(files, limits)
        for number, file in enumerate(files):
            yield number
            self._embedded(file, limits)

    def find(self, files: Sequence[str], query: str, limits: Limits) -> list[Found]:
        """Return the best pages for a text, best first: of the server and of the uploads.

        Raises:
            ValueError: There is nothing to search, or something exceeds a limit.
        """
        query = limits.check_prompt(query)
        self._check_number(files, limits)
        if not files and not self.pages:
            raise ValueError("No pages yet. Upload the pictures to search.")
        scores: list[tuple[float, Page | str]] = []
        if self.index and self.pages:
            scores += [(hit.score, hit.page) for hit in self.index.search([query], TOP)[0]]
        if files:
            embedded = [self._embedded(file, limits) for file in files]
            pages = Embeddings(
                np.concatenate([page.vectors for page in embedded]),
                np.concatenate([page.valid for page in embedded]),
            )
            row = self.retriever.score(self.retriever.embed_queries(query), pages)[0]
            scores += list(zip(row.tolist(), files, strict=True))
        best = sorted(scores, key=lambda pair: -pair[0])[:TOP]
        return [Found(Path(str(page)).name, score, _picture(page, limits)) for score, page in best]

    def _check_number(self, files: Sequence[str], limits: Limits) -> None:
        if len(files) > limits.pages:
            raise ValueError(f"Too many pages: got {len(files)}, the limit is {limits.pages}.")

    def _embedded(self, file: str, limits: Limits) -> Embeddings:
        """The vectors of an upload, from the cache if they are there. Pages are embedded one by
        one, since batches of every size would compile a program each."""
        vectors = self._vectors.pop(file, None)
        if vectors is None:
            vectors = self.retriever.embed_pages([limits.open_image(Path(file))])
        self._vectors[file] = vectors
        while len(self._vectors) > CACHED:
            self._vectors.popitem(last=False)
        return vectors


def _picture(page: Page | str, limits: Limits) -> Image.Image:
    """The picture of a page or of an upload, scaled down to `MAX_SIDE`."""
    picture = limits.open_image(Path(page)) if isinstance(page, str) else open_page(page)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


@contextmanager
def open_searcher(retriever: Retriever, paths: Sequence[str]) -> Iterator[Searcher]:
    """Make a `Searcher` of an index, or of the pages of files and directories, which are embedded.

    Raises:
        ValueError: A path does not exist, none has a page, or the index is of another model.
    """
    if not paths:
        yield Searcher(retriever)
        return
    if len(paths) == 1 and (Path(paths[0]) / INDEX).is_file():
        yield Searcher(retriever, Index(Path(paths[0]), retriever))
        return
    with tempfile.TemporaryDirectory(prefix="paligemma-pages-") as folder:
        index = Index(Path(folder), retriever)
        _, errors = embed_files(index, paths)
        if not index.pages:
            reason = next(iter(errors.values()), "there are no pictures and no PDFs")
            raise ValueError(f"{', '.join(paths)} has no page that can be embedded: {reason}")
        yield Searcher(retriever, index)
