"""Parts of the recipe of the embedded checkpoint: initial parameters, probe, tokenizer."""

import numpy as np
import pytest

from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tiny.digits import glyphs
from paligemma_jax.tiny.initialize import waves
from paligemma_jax.tiny.probe import patch_targets
from paligemma_jax.tiny.scenes import MAX_DIGITS, SIZE, compose
from paligemma_jax.tiny.tokenizer import train_tokenizer

pytest.importorskip("sklearn")


def test_patch_targets_name_the_digit_that_covers_most_of_a_patch():
    source = glyphs(held_out=True)
    scenes = compose(np.random.default_rng(0), source, 200)
    targets = patch_targets(scenes, source, 8)
    for i in range(20):
        label, place = targets["label"][i], targets["place"][i]
        for k, (y0, x0, y1, x1) in enumerate(scenes.boxes[i][scenes.labels[i] >= 0]):
            # The patch under the middle of the box; no other box is near.
            patch = (y0 + y1) // 28 * 8 + (x0 + x1) // 28
            assert label[patch] == scenes.labels[i, k] and place[patch] == k
            box, look = targets["box"][i, patch], targets["look"][i, patch]
            np.testing.assert_allclose(box * SIZE, [y0, x0, y1, x1], rtol=1e-6)
            ink = source.alpha[scenes.glyphs[i, k]]
            np.testing.assert_allclose(look.mean(), ink.mean(), rtol=1e-5)
        assert 0 < (label < 10).sum() < 64
        assert ((place == MAX_DIGITS) == (label == 10)).all()


def test_neighbouring_locations_start_with_similar_embeddings():
    table = np.asarray(waves(1024, 160))
    np.testing.assert_allclose((table**2).sum(1), 1, rtol=1e-5)
    similarity = table @ table[500]
    assert similarity.argmax() == 500
    assert similarity[510] > 0.7 > 0.4 > similarity[600]
    assert (np.diff(similarity[500:530]) < 0).all()


def test_the_tokenizer_is_of_the_same_kind_as_gemmas(tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.loc(1023) - tokenizer.loc(0) == 1023
    assert tokenizer.seg(0) == tokenizer.loc(1023) + 1
    assert tokenizer.image_id == tokenizer.seg(127) + 1 == tokenizer.vocab_size - 1
    for text, count in (("37", 2), ("<loc0037>", 1), ("\n", 1)):
        assert len(tokenizer.encode(text)) == count
    assert tokenizer.decode(tokenizer.encode("Grüße, 漢字")) == "Grüße, 漢字"
