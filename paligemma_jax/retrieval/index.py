"""An index of pages on disk, which grows part by part.

    DIR/index.json           version, model, the length of a vector, and for each part its pages
    DIR/part-00000.safetensors   vectors float16[N, T, E] of N pages, none of them a pad

A part is written before index.json names it, and index.json is replaced at once, so that a stopped
run loses one part at most and leaves no index that cannot be read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Float16, Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from convert.typed_json import Count, Positive, load_json
from paligemma_jax.retrieval.retriever import Embeddings, Retriever

INDEX, VERSION = "index.json", 1
VECTORS = "vectors"


class Page(msgspec.Struct, frozen=True):
    """A page of a file: its path, and its number in a PDF, from 1; 0 is a picture."""

    file: str
    number: Count = 0

    def __str__(self) -> str:
        return f"{self.file}#{self.number}" if self.number else self.file


class _Content(msgspec.Struct):
    """index.json."""

    version: int
    model: str
    size: Positive
    parts: list[list[Page]] = []


@dataclass(frozen=True)
class Hit:
    """A page that was found, and the score of its query."""

    page: Page
    score: float


class Index:
    """An index of the pages of one model.

    Args:
        directory: Where the index is, or will be.
        retriever: The model that embeds its pages and queries.

    Raises:
        ValueError: The index is damaged, or was made by another model.
    """

    def __init__(self, directory: Path, retriever: Retriever):
        self.directory, self.retriever = directory, retriever
        size = retriever.model.projection.shape[0]
        self._content = _Content(VERSION, retriever.digest, size)
        if (directory / INDEX).exists():
            self._content = load_json(directory / INDEX, _Content)
            self._check(size)

    def _check(self, size: int) -> None:
        file, content = self.directory / INDEX, self._content
        if content.version != VERSION:
            raise ValueError(f"{file} must have version {VERSION}, got {content.version}")
        if (content.model, content.size) != (self.retriever.digest, size):
            raise ValueError(
                f"{self.directory} was made by another model: embed its pages again into another "
                "directory, or search with the model that made it"
            )

    @property
    def pages(self) -> list[Page]:
        """All pages, in the order in which they were added."""
        return [page for part in self._content.parts for page in part]

    def add(self, pages: Sequence[Page], embeddings: Embeddings) -> None:
        """Add a part of pages.

        Raises:
            OSError: The disk is full, or not writable; the index is then as before.
        """
        length = int(embeddings.valid.sum(axis=1).max())
        vectors = embeddings.vectors[:, :length].astype(np.float16)
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._part(len(self._content.parts))
        _replace(file, lambda new: save_file({VECTORS: vectors}, new))
        content = msgspec.structs.replace(self._content, parts=[*self._content.parts, list(pages)])
        encoded = msgspec.json.format(msgspec.json.encode(content), indent=1)
        _replace(self.directory / INDEX, lambda new: new.write_bytes(encoded))
        self._content = content

    def search(self, queries: Sequence[str], top: int = 5) -> list[list[Hit]]:
        """Return the best pages of each query, best first.

        Raises:
            ValueError: The index is empty, or a part is damaged.
        """
        if not self.pages:
            raise ValueError(f"{self.directory} has no pages: add some with paligemma-jax embed")
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        embedded = self.retriever.embed_queries(list(queries))
        scores = [self.retriever.score(embedded, part) for part in self._parts()]
        joined: Float32[np.ndarray, "Q P"] = np.concatenate(scores, axis=1)
        order = np.argsort(-joined, axis=1, kind="stable")[:, :top]
        pages = self.pages
        return [
            [Hit(pages[i], float(row[i])) for i in best]
            for row, best in zip(joined, order.tolist(), strict=True)
        ]

    def _parts(self) -> Iterator[Embeddings]:
        for number, pages in enumerate(self._content.parts):
            vectors = self._read(number, len(pages))
            yield Embeddings(vectors, np.ones(vectors.shape[:2], bool))

    def _read(self, number: int, pages: int) -> Float16[np.ndarray, "N T E"]:
        file = self._part(number)
        try:
            vectors = load_file(file)[VECTORS]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged ({str(error).splitlines()[0]}): embed the pages again"
            ) from None
        expected = (pages, self._content.size)
        if vectors.ndim != 3 or (len(vectors), vectors.shape[-1]) != expected:
            raise ValueError(
                f"{file} is damaged: it must have vectors of length {expected[1]} of {pages} "
                f"pages, got {list(vectors.shape)}"
            )
        return vectors

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05}.safetensors"


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it appears complete."""
    new = file.with_name(f".{file.name}.new")
    write(new)
    with new.open("rb") as opened:
        os.fsync(opened.fileno())
    new.replace(file)
