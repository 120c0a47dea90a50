"""The tab that searches pages: its logic, and what its server accepts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.demo_client import request, upload
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.demo import html
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.search import Searcher, open_searcher
from paligemma_jax.retrieval import retriever
from paligemma_jax.retrieval.embed import embed_files
from paligemma_jax.retrieval.index import Index


@pytest.fixture(scope="module")
def colpali():
    return retriever.load("tiny", size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pages of random colors."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def expected(colpali, files, query):
    """The names and scores of pages, best first, from the retriever itself."""
    pages = colpali.embed_pages([str(file) for file in files], batch_size=1)
    scores = colpali.score(colpali.embed_queries(query), pages)[0]
    return [(files[i].name, float(scores[i])) for i in np.argsort(-scores)]


def check_found(found, names_and_scores):
    assert [page.name for page in found] == [name for name, _ in names_and_scores]
    scores = [score for _, score in names_and_scores]
    np.testing.assert_allclose([page.score for page in found], scores, rtol=2e-3)  # float16


def test_pages_of_the_server_and_uploads_are_ranked_together(colpali, folder):
    files = sorted(folder.glob("*.png"))[:5]
    with open_searcher(colpali, [str(file) for file in files]) as searcher:
        check_found(searcher.find([], "red", Limits()), expected(colpali, files, "red"))
        found = searcher.find([str(DIGITS)], "red", Limits())
        check_found(found, expected(colpali, [*files, DIGITS], "red"))
        shown = next(page for page in found if page.name == DIGITS.name)
        assert shown.picture.size == Image.open(DIGITS).size
        assert shown.caption == f"{shown.score:.2f} {DIGITS.name}"


def test_an_index_is_opened_and_not_embedded_again(colpali, folder, tmp_path, monkeypatch):
    embed_files(Index(tmp_path / "index", colpali), [folder])
    monkeypatch.delattr(retriever.Retriever, "embed_pages")
    with open_searcher(colpali, [str(tmp_path / "index")]) as searcher:
        assert searcher.pages == 8 and len(searcher.find([], "red", Limits())) == 6


def test_uploads_are_embedded_once(colpali, folder, monkeypatch):
    searcher, files = Searcher(colpali), [str(folder / "0.png"), str(folder / "1.png")]
    assert list(searcher.embed(files, Limits())) == [0, 1]
    monkeypatch.delattr(retriever.Retriever, "embed_pages")
    assert len(searcher.find(files, "red", Limits())) == 2
    assert len(searcher.find(files[:1], "blue", Limits())) == 1


def test_the_cache_is_bounded(colpali, folder, monkeypatch):
    monkeypatch.setattr("paligemma_jax.demo.search.CACHED", 1)
    searcher, files = Searcher(colpali), [str(folder / "0.png"), str(folder / "1.png")]
    assert len(searcher.find(files, "red", Limits())) == 2
    assert list(searcher._vectors) == files[1:]


def test_what_cannot_be_searched_is_one_sentence(colpali, folder, tmp_path):
    searcher, file = Searcher(colpali), str(folder / "0.png")
    for files, query, message in (
        ([], "red", "No pages yet"),
        ([file], " ", "The prompt is empty"),
        ([file] * 3, "red", "Too many pages: got 3, the limit is 2"),
        ([str(tmp_path / "gone.png")], "red", "gone.png is no longer stored"),
    ):
        with pytest.raises(ValueError, match=message):
            searcher.find(files, query, Limits(pages=2))
    message = "has no page that can be embedded"
    with pytest.raises(ValueError, match=message), open_searcher(colpali, [str(tmp_path)]):
        pass


def test_pages_need_a_model(command):
    code, _, error = command("demo", "--pages", "scans")
    assert code == 2 and "--pages needs --search" in error


def test_the_text_above_the_pages():
    assert "The server has 1,024 pages" in html.search_invitation(1024)
    assert "Add pictures of pages below" in html.search_invitation(0)
    assert "The best 1 of 1 page, with" in html.found(1, 1)


@pytest.mark.parametrize("search", [True, False])
def test_one_upload_may_have_the_pictures_of_a_visitor(colpali, search):
    """Only where there are pages to search. More than the space of a visitor is refused."""
    pytest.importorskip("gradio")
    from paligemma_jax.demo.server import serve

    limits = Limits(megabytes=0.2, visitor_megabytes=2, total_megabytes=4)
    searcher = Searcher(colpali) if search else None
    with serve({"tiny": pg.load("tiny")}, limits, port=0, searcher=searcher) as address:
        assert (b"Search pages" in request(f"{address}config")[1]) == search
        body = b"x" * 1_500_000  # beyond one picture, and the megabyte of every request
        status, answer = upload(address.rstrip("/"), body)
        assert status != 200  # Gradio refuses the file by itself
        assert (b"the limit is 1.2 MB" in answer) == (not search)
        status, answer = upload(address.rstrip("/"), b"x" * 4_000_000)
        assert status == 413 and (b"the limit is 3 MB" in answer) == search
