"""ColPali against transformers, on random weights: processing, embeddings, scores, checkpoints."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.hf_colpali import SIZE, make_colpali

import paligemma_jax as pg
from paligemma_jax.retrieval import retriever

QUERIES = ["a cat", "what color is the car on the street", "the dog sat on red"]


@pytest.fixture(scope="module", params=["pg2", "pg1"])
def case(request, tmp_path_factory):
    """(transformers model, its processor, directory, our retriever)."""
    directory = tmp_path_factory.mktemp("colpali") / request.param
    reference, processor = make_colpali(request.param, directory)
    return reference, processor, directory, retriever.load(directory)


@pytest.fixture(scope="module")
def pages():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)) for _ in range(3)]


def reference_embeddings(reference, batch):
    """The embeddings of transformers, with the mask types that its processor gives."""
    batch = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        embeddings = reference(**batch).embeddings.numpy()
    masks = batch["attention_mask"].numpy().astype(bool)
    return [row[mask] for row, mask in zip(embeddings, masks, strict=True)]


def check_equal(actual, expected):
    assert len(actual) == len(expected)
    for vectors, valid, target in zip(actual.vectors, actual.valid, expected, strict=True):
        assert vectors[valid].shape == target.shape
        np.testing.assert_allclose(vectors[valid], target, atol=1e-5)
        assert not vectors[~valid].any()


def test_queries_and_pages_are_embedded_as_by_transformers(case, pages):
    reference, processor, _, ours = case
    queries = ours.embed_queries(QUERIES, batch_size=2)
    check_equal(queries, reference_embeddings(reference, processor(text=QUERIES, padding=True)))
    embedded = ours.embed_pages(pages, batch_size=2)
    check_equal(embedded, reference_embeddings(reference, processor(images=pages)))
    assert queries.vectors.shape[-1] == embedded.vectors.shape[-1] == SIZE


def test_scores_are_those_of_transformers(case, pages, monkeypatch):
    _, processor, _, ours = case
    queries, embedded = ours.embed_queries(QUERIES), ours.embed_pages(pages)
    lists = [
        [torch.tensor(v[m]) for v, m in zip(e.vectors, e.valid, strict=True)]
        for e in (queries, embedded)
    ]
    expected = processor.score_retrieval(*lists).numpy()
    np.testing.assert_allclose(ours.score(queries, embedded), expected, rtol=1e-5)
    monkeypatch.setattr(retriever, "CHUNK", 2)
    np.testing.assert_allclose(ours.score(queries, embedded), expected, rtol=1e-5)


def test_a_saved_checkpoint_loads_in_transformers(case, tmp_path):
    from transformers import ColPaliForRetrieval

    reference, _, directory, ours = case
    ours.save(tmp_path / "saved", directory)
    again = ColPaliForRetrieval.from_pretrained(tmp_path / "saved").state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(again[name], value), name
    loaded = retriever.load(tmp_path / "saved")
    assert loaded.digest == ours.digest
    np.testing.assert_array_equal(
        loaded.embed_queries(QUERIES).vectors, ours.embed_queries(QUERIES).vectors
    )


def test_a_page_is_matched_by_its_patches(case, pages):
    *_, ours = case
    match = ours.match(QUERIES[0], pages[0])
    queries, embedded = ours.embed_queries(QUERIES[0]), ours.embed_pages(pages[:1])
    assert match.shape == (queries.valid.sum(), ours.processor.image_tokens)
    expected = queries.vectors[0, 0] @ embedded.vectors[0, 0]
    assert match[0, 0] == pytest.approx(float(expected), abs=1e-6)


def broken(directory, target, edit):
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


BROKEN = {
    "size": (lambda c: c.update(embedding_dim=9), "must be a float array"),
    "no vlm": (lambda c: c.pop("vlm_config"), "vlm_config"),
    "another vlm": (lambda c: c["vlm_config"].update(model_type="llava"), "vlm_config in"),
    "not a size": (lambda c: c.update(embedding_dim="x"), "embedding_dim"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_sentence(case, tmp_path, name):
    edit, message = BROKEN[name]
    with pytest.raises(ValueError) as error:
        retriever.load(broken(case[2], tmp_path / "broken", edit))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_plain_paligemma_needs_a_projection(case):
    with pytest.raises(ValueError, match="tiny is a PaliGemma without a projection"):
        retriever.load("tiny")
    assert retriever.load("tiny", size=8).model.projection.kernel[...].shape == (8, 160)
    with pytest.raises(ValueError, match="size must be left out"):
        retriever.load(case[2], size=8)
    with pytest.raises(ValueError, match="model_type must be 'paligemma', got 'colpali'"):
        pg.load(case[2])


def test_other_vectors_are_refused(case, pages):
    *_, ours = case
    other = retriever.load("tiny", size=8)
    with pytest.raises(ValueError, match="vectors of one length, got 8 and 16"):
        ours.score(other.embed_queries("a"), ours.embed_pages(pages[:1]))
    for empty in (lambda: ours.embed_pages([]), lambda: ours.embed_queries([])):
        with pytest.raises(ValueError, match="nothing to embed"):
            empty()
