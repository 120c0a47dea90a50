"""An index on disk grows, survives a kill, and refuses what does not belong to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.paths import DIGITS, GOLDEN

from paligemma_jax.retrieval import embed, index, pages, retriever
from paligemma_jax.retrieval.index import Index, Page


@pytest.fixture(scope="module")
def model():
    return retriever.load("tiny", size=16)


@pytest.fixture
def folder(tmp_path):
    """Two pictures in a folder and below it, one that cannot be read, and a text."""
    directory = tmp_path / "scans"
    (directory / "more").mkdir(parents=True)
    shutil.copy(DIGITS, directory / "a.jpg")
    shutil.copy(GOLDEN / "image.png", directory / "more" / "b.png")
    (directory / "broken.png").write_text("no picture")
    (directory / "notes.txt").write_text("no page")
    return directory


def test_pages_of_a_folder_are_found_again(model, folder, tmp_path):
    made = Index(tmp_path / "index", model)
    added, errors = embed.embed_files(made, [folder])
    assert added == 2 and [Path(name).name for name in errors] == ["broken.png"]
    opened = Index(tmp_path / "index", model)
    assert [Path(page.file).name for page in opened.pages] == ["a.jpg", "b.png"]
    hits = opened.search(["a cat", "digits"], top=5)
    queries = model.embed_queries(["a cat", "digits"])
    scores = model.score(queries, model.embed_pages([page.file for page in opened.pages]))
    for row, found in zip(scores, hits, strict=True):
        expected = sorted(row, reverse=True)
        np.testing.assert_allclose([hit.score for hit in found], expected, rtol=2e-3)  # float16
    assert embed.embed_files(opened, [folder])[0] == 0


def test_an_interrupted_run_continues(model, folder, tmp_path, monkeypatch):
    """Killed after a part was written and before the index names it."""
    monkeypatch.setattr(embed, "PART", 1)
    made, write = Index(tmp_path / "index", model), index._replace

    def stop_at_the_second_index(file, content):
        if file.name == index.INDEX and made.pages:
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(index, "_replace", stop_at_the_second_index)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_files(made, [folder])
    monkeypatch.setattr(index, "_replace", write)
    again = Index(tmp_path / "index", model)
    assert len(again.pages) == 1
    assert embed.embed_files(again, [folder])[0] == 1
    assert len(Index(tmp_path / "index", model).search(["x"])[0]) == 2
    assert not [file for file in (tmp_path / "index").iterdir() if file.name.startswith(".")]


def damaged(change):
    def make(directory):
        file = directory / index.INDEX
        content = json.loads(file.read_text())
        change(content, directory)
        file.write_text(json.dumps(content))

    return make


DAMAGE = {
    "version": (damaged(lambda c, d: c.update(version=9)), "must have version 1, got 9"),
    "model": (damaged(lambda c, d: c.update(model="x")), "was made by another model"),
    "types": (damaged(lambda c, d: c.update(parts=3)), "parts"),
    "no json": (lambda d: (d / index.INDEX).write_text("{"), index.INDEX),
    "pages": (damaged(lambda c, d: c["parts"][0].pop()), "part-00000.safetensors is damaged"),
    "cut": (lambda d: (d / "part-00000.safetensors").write_bytes(b"123"), "is damaged"),
    "gone": (lambda d: (d / "part-00000.safetensors").unlink(), "is damaged"),
}


@pytest.fixture(scope="module")
def small_index(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "index"
    made = Index(directory, model)
    made.add([Page("a"), Page("b", 2)], model.embed_pages([str(DIGITS)] * 2))
    return directory


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_one_sentence(model, small_index, tmp_path, name):
    damage, message = DAMAGE[name]
    directory = shutil.copytree(small_index, tmp_path / "index")
    damage(directory)
    with pytest.raises(ValueError) as error:
        Index(directory, model).search(["x"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_index_and_a_wrong_count_are_one_sentence(model, small_index, tmp_path):
    with pytest.raises(ValueError, match="has no pages: add some with paligemma-jax embed"):
        Index(tmp_path / "none", model).search(["x"])
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        Index(small_index, model).search(["x"], top=0)


def test_pages_of_a_pdf_are_rendered(tmp_path):
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed")
    picture = Image.new("RGB", (300, 200), "red")
    picture.paste("blue", (0, 0, 150, 200))
    file = tmp_path / "two.pdf"
    picture.save(file, save_all=True, append_images=[picture.rotate(180)])
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    listed, errors = pages.list_pages([tmp_path])
    assert [str(page) for page in listed] == [f"{file}#1", f"{file}#2"]
    assert "is not a readable PDF" in errors[str(tmp_path / "broken.pdf")]
    first, second = (np.asarray(pages.open_page(page), int) for page in listed)
    assert max(first.shape) == pages.PIXELS
    assert first[50, 50, 2] > 200 > 60 > first[50, 50, 0]  # blue, as the left half
    assert second[50, 50, 0] > 200 > 60 > second[50, 50, 2]
    with pytest.raises(ValueError, match="has 2 pages, got page 3"):
        pages.open_page(Page(str(file), 3))


def test_without_pypdfium2_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"pip install 'paligemma-jax\[pdf\]'"):
        pages.list_pages([tmp_path])


def test_commands(command, model, folder, tmp_path):
    model.save(tmp_path / "colpali", "tiny")
    made = ("--model", tmp_path / "colpali")
    code, out, err = command("embed", folder, "--output", tmp_path / "index", *made)
    assert code == 0 and "added 2 pages" in out and "1 skipped" in out
    assert "not embedded" in err and "broken.png" in err
    code, out, _ = command("search", tmp_path / "index", "a cat", "--top", 1, "--json", *made)
    assert code == 0 and json.loads(out)["query"] == "a cat"
    assert command("search", tmp_path / "index", "a cat", *made)[1].count("\n") == 2
    for arguments, message in {
        ("search", tmp_path, "a cat", *made): "has no index.json",
        ("search", tmp_path / "index", "a", "--model", "tiny"): "without a projection",
        ("embed", tmp_path / "absent", "--output", "x", *made): "no such file or directory",
        ("embed", folder / "broken.png", "--output", tmp_path / "y", *made): "none of",
    }.items():
        code, _, err = command(*arguments)
        assert code == 2 and message in err.splitlines()[-1]
