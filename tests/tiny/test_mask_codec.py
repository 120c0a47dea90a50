"""The recipe of the embedded mask codec."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from paligemma_jax.processing.locations import paste
from paligemma_jax.processing.mask_codec import MaskCodec, crop_mask, load_codec
from paligemma_jax.tiny import mask_codec
from paligemma_jax.tiny.digits import CODEC, glyph_masks, glyphs
from paligemma_jax.tiny.scenes import compose

pytest.importorskip("sklearn", reason="the digits are scikit-learn's: install the extra train")


def test_the_embedded_codec_reconstructs_held_out_digits():
    ious = mask_codec.reconstruction_ious(
        load_codec(CODEC), glyph_masks(glyphs(held_out=True).alpha)
    )
    assert ious.mean() > 0.92 and np.quantile(ious, 0.05) > 0.85
    assert CODEC.stat().st_size < 3e6
    assert {str(value.dtype) for value in load_file(CODEC).values()} == {"float16"}


def test_masks_of_a_picture_survive_codes():
    """As for training data, a mask of the full picture is cropped, encoded, decoded and pasted."""
    codec = load_codec(CODEC)
    scenes = compose(np.random.default_rng(0), glyphs(held_out=True), 8, (480, 640))
    assert scenes.masks is not None
    boxes = scenes.boxes[:, 0].tolist()
    for mask, (top, left, bottom, right) in zip(scenes.masks[:, 0], boxes, strict=True):
        box = (left, top, right, bottom)
        (drawn,) = codec.decode(codec.encode(crop_mask(mask, box)[None]))
        pasted = paste(drawn, box, (640, 480))
        assert (pasted & mask).sum() / (pasted | mask).sum() > 0.85
        assert not pasted[:top].any() and not pasted[:, right:].any()


@pytest.mark.slow
def test_the_recipe_learns():
    """Within a few steps, reconstruction improves and several codes are used."""
    masks = glyph_masks(glyphs(held_out=True).alpha)
    before, after = MaskCodec(1, 4), mask_codec.train_codec(1, 4, 60, masks)
    before_iou, after_iou = (
        mask_codec.reconstruction_ious(codec, masks).mean() for codec in (before, after)
    )
    assert after_iou > before_iou + 0.1 and np.unique(after.encode(masks)).size > 20


def test_k_means_centres_are_the_means_of_their_points():
    """Points are nearer to their centres than to random points."""
    points = np.random.default_rng(0).normal(size=(500, 3))
    centres = mask_codec.k_means(points, 8, rounds=100)
    distances = ((points[:, None] - centres) ** 2).sum(-1)
    nearest = distances.argmin(1)
    means = [points[nearest == n].mean(0) for n in range(8)]
    np.testing.assert_allclose(centres, means, atol=1e-6)
    random = ((points[:, None] - points[:8]) ** 2).sum(-1)
    assert distances.min(1).mean() < 0.8 * random.min(1).mean()
