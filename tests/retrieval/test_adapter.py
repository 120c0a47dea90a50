"""ColPali checkpoints that are adapters, against peft on random weights."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.hf_colpali import make_adapter, make_colpali, make_engine_colpali

from paligemma_jax.retrieval import retriever

QUERIES = ["a cat", "what color is the car on the street"]
LANGUAGE = r".*(language_model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
PUBLISHED = rf"({LANGUAGE}|.*(custom_text_proj).*$)"  # target_modules of vidore/colpali-v1.3


def embeddings(model, processor):
    """The vectors of the queries and of a page."""
    rng = np.random.default_rng(0)
    page = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
    result = []
    for batch in (processor(text=QUERIES, padding=True), processor(images=[page])):
        batch.pop("labels", None)
        with torch.no_grad():
            vectors = model(**batch)
        vectors = getattr(vectors, "embeddings", vectors)
        result += [v[m.bool()] for v, m in zip(vectors, batch["attention_mask"], strict=True)]
    return [vectors.numpy() for vectors in result], page


def check_equal(ours, model, processor):
    expected, page = embeddings(model, processor)
    embedded = [ours.embed_queries(QUERIES), ours.embed_pages([page])]
    rows = [v[m] for e in embedded for v, m in zip(e.vectors, e.valid, strict=True)]
    for actual, target in zip(rows, expected, strict=True):
        assert actual.shape == target.shape
        np.testing.assert_allclose(actual, target, atol=1e-5)


def rename_keys(directory, *replacement):
    """Write the names of an adapter as older releases of colpali-engine did."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {re.sub(*replacement, key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)


def test_the_layout_of_the_published_adapters(tmp_path):
    """The projection of the base has factors, too. The factors change the vectors."""
    model, processor = make_engine_colpali(tmp_path / "base")
    base = retriever.load(tmp_path / "base")
    check_equal(base, model, processor)
    adapted = make_adapter(model, tmp_path / "base", tmp_path / "lora", target_modules=PUBLISHED)
    ours = retriever.load(tmp_path / "lora")
    check_equal(ours, adapted, processor)
    before, after = (x.embed_queries(QUERIES).vectors for x in (base, ours))
    assert np.abs(before - after).max() > 0.05 and base.digest != ours.digest
    rename_keys(
        tmp_path / "lora", r"\.model\.model\.language_model\.", ".model.language_model.model."
    )
    check_equal(retriever.load(tmp_path / "lora"), adapted, processor)


@pytest.mark.parametrize("projection", [True, False], ids=["colpali", "paligemma"])
def test_a_saved_projection_replaces_that_of_the_base(tmp_path, projection):
    model, processor = make_engine_colpali(tmp_path / "base", projection)
    options = {"target_modules": LANGUAGE, "modules_to_save": ["custom_text_proj"]}
    adapted = make_adapter(model, tmp_path / "base", tmp_path / "lora", **options)
    check_equal(retriever.load(tmp_path / "lora"), adapted, processor)


@pytest.mark.parametrize("saved", [["embedding_proj_layer"], None], ids=["saved", "language only"])
def test_an_adapter_of_transformers_colpali(tmp_path, saved):
    model, processor = make_colpali("pg2", tmp_path / "base")
    base = retriever.load(tmp_path / "base")
    options = {"target_modules": LANGUAGE, "modules_to_save": saved}
    adapted = make_adapter(model, tmp_path / "base", tmp_path / "lora", **options)
    ours = retriever.load(tmp_path / "lora")
    check_equal(ours, adapted, processor)
    assert base.digest != ours.digest  # an index of the one cannot be searched by the other


def test_the_base_may_have_moved(tmp_path):
    model, processor = make_engine_colpali(tmp_path / "base")
    adapted = make_adapter(model, "/gone", tmp_path / "lora", target_modules=PUBLISHED)
    with pytest.raises(ValueError, match=r"cannot find the base checkpoint .*/gone"):
        retriever.load(tmp_path / "lora")
    check_equal(retriever.load(tmp_path / "lora", base=tmp_path / "base"), adapted, processor)


def test_what_does_not_fit_is_one_sentence(tmp_path):
    model, _ = make_engine_colpali(tmp_path / "base", projection=False)
    make_adapter(model, tmp_path / "base", tmp_path / "lora", target_modules=PUBLISHED)
    with pytest.raises(ValueError) as error:
        retriever.load(tmp_path / "lora")
    assert "\n" not in str(error.value)
    assert "has no custom_text_proj, which the adapter" in str(error.value)
    file = tmp_path / "lora/adapter_config.json"
    config = json.loads(file.read_text()) | {"r": 3}
    file.write_text(json.dumps(config))
    make_engine_colpali(tmp_path / "engine")
    with pytest.raises(ValueError, match="must have rank 3, but its weights have 4"):
        retriever.load(tmp_path / "lora", base=tmp_path / "engine")
