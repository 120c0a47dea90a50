"""The pages of files: pictures, and the pages of PDFs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_jax.processing.image import load_image
from paligemma_jax.retrieval.index import Page

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
PDF = ".pdf"
PIXELS = 1024  # of the longer side of a rendered page
_lock = threading.Lock()  # PDFium is not thread-safe


def list_pages(paths: Iterable[str | Path]) -> tuple[list[Page], dict[str, str]]:
    """List the pages of files, and of the pictures and PDFs in directories and below.

    Returns:
        The pages, and why a PDF has none, by file.

    Raises:
        ValueError: A path does not exist, or a PDF needs the extra `pdf`.
    """
    pages: list[Page] = []
    errors: dict[str, str] = {}
    files = list(_files(paths))
    if any(file.suffix.lower() == PDF for file in files):
        _pdfium()
    for file in files:
        if file.suffix.lower() != PDF:
            pages.append(Page(str(file)))
            continue
        try:
            with _open_pdf(file) as document:
                pages += [Page(str(file), number + 1) for number in range(len(document))]
        except ValueError as error:
            errors[str(file)] = str(error)
    return pages, errors


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(
                file for file in path.rglob("*") if file.suffix.lower() in {*PICTURES, PDF}
            )
        elif path.exists():
            yield path
        else:
            raise ValueError(f"{path}: no such file or directory")


def open_page(page: Page) -> Image.Image:
    """Open a picture, or render a page of a PDF.

    Raises:
        ValueError: It cannot be read.
    """
    if not page.number:
        return load_image(page.file)
    with _open_pdf(Path(page.file)) as document:
        if page.number > len(document):
            raise ValueError(f"{page.file} has {len(document)} pages, got page {page.number}")
        opened = document[page.number - 1]
        scale = PIXELS / max(opened.get_size())
        return opened.render(scale=scale).to_pil().convert("RGB")


@contextmanager
def _open_pdf(file: Path) -> Iterator[Any]:  # a class of an optional package
    pdfium = _pdfium()
    with _lock:
        try:
            with pdfium.PdfDocument(file) as document:
                yield document
        except (pdfium.PdfiumError, OSError) as error:
            raise ValueError(f"{file} is not a readable PDF: {error}") from None


def _pdfium() -> Any:  # a module that may be missing
    try:
        import pypdfium2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "PDFs need the package pypdfium2: pip install 'paligemma-jax[pdf]'"
        ) from None
    return pypdfium2
