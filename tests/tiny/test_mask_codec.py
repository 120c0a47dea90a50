"""The mask codec: the published network stated again in torch, its file, the embedded one, and masks as codes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import paligemma_jax as pg
from paligemma_jax.processing.locations import paste
from paligemma_jax.processing.mask_codec import (
    MaskCodec,
    crop_mask,
    from_tensors,
    load_codec,
    save_codec,
    tensors,
)
from paligemma_jax.tiny import digits, mask_codec

# Of vae-oid.npz, as the network of arXiv:2301.02229 has them with configs/insseg/ait_insseg_vqvae.py; a residual block is written out below.
SHAPES = {
    "encoder.0": (16, 1, 4, 4), "encoder.2": (32, 16, 4, 4), "encoder.4": (64, 32, 4, 4), "encoder.6": (128, 64, 4, 4), 
    "encoder.10": (512, 128, 1, 1),
    "decoder.0": (128, 512, 1, 1), "decoder.4": (128, 128, 4, 4), "decoder.6": (128, 64, 4, 4), "decoder.8": (64, 32, 4, 4),
    "decoder.10": (32, 16, 4, 4), "decoder.12": (1, 16, 1, 1),
}  # fmt: skip
SHAPES |= {
    f"{block}.net.{n}": (128, 128, k, k) for block in ("encoder.8", "encoder.9", "decoder.2", "decoder.3") for n, k in ((0, 3), (2, 3), (4, 1))
}
ENLARGING = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights under the published names and in the published shapes, in an .npz as numpy writes it."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        fan_in = np.prod(shape[1:]) if name not in ENLARGING else shape[0] * 4
        weights[f"{name}.weight"] = (rng.normal(size=shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.2, shape[1] if name in ENLARGING else shape[0]).astype(np.float32)
    weights["_vq_vae._embedding"] = rng.normal(size=(128, 512)).astype(np.float32)
    file = tmp_path_factory.mktemp("codec") / "vae-oid.npz"
    np.savez(file, **weights, **{"_vq_vae._ema_w": np.ones(3)})
    return file, weights


def torch_encoder(weights, images):
    """[B, 1, 64, 64] in 0..1 -> [B, 512, 4, 4], with torch's own functions."""
    import torch.nn.functional as f

    x = 2 * images - 1
    for n in (0, 2, 4, 6):
        x = f.relu(f.conv2d(x, weights[f"encoder.{n}.weight"], weights[f"encoder.{n}.bias"], stride=2, padding=1))
    for n in (8, 9):
        x = torch_residual(weights, f"encoder.{n}.net", x)
    return f.conv2d(x, weights["encoder.10.weight"], weights["encoder.10.bias"])


def torch_decoder(weights, x):
    """[B, 512, 4, 4] -> [B, 1, 64, 64]"""
    import torch.nn.functional as f

    x = f.relu(f.conv2d(x, weights["decoder.0.weight"], weights["decoder.0.bias"]))
    for n in (2, 3):
        x = torch_residual(weights, f"decoder.{n}.net", x)
    for name in ENLARGING:
        x = f.relu(f.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1))
    return f.conv2d(x, weights["decoder.12.weight"], weights["decoder.12.bias"])


def torch_residual(weights, name, x):
    import torch.nn.functional as f

    y = f.relu(f.conv2d(x, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"], padding=1))
    y = f.relu(f.conv2d(y, weights[f"{name}.2.weight"], weights[f"{name}.2.bias"], padding=1))
    return x + f.conv2d(y, weights[f"{name}.4.weight"], weights[f"{name}.4.bias"])


def test_the_published_network(published):
    """Encoder, codes and decoder on weights of the published shapes, against torch."""
    torch = pytest.importorskip("torch", reason="the network is stated again in torch: install the extra test")
    file, weights = published
    weights = {name: torch.tensor(value) for name, value in weights.items()}
    codec, rng = load_codec(file), np.random.default_rng(1)
    images = rng.random((6, 64, 64)).astype(np.float32)
    expected = torch_encoder(weights, torch.tensor(images)[:, None]).permute(0, 2, 3, 1)
    found = np.asarray(jax.jit(MaskCodec.embed)(codec, images))
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
    distances = torch.cdist(expected.reshape(-1, 512).double(), weights["_vq_vae._embedding"].double())
    np.testing.assert_array_equal(codec.encode(images), distances.argmin(1).reshape(6, 16))
    codes = rng.integers(0, 128, (6, 16))
    drawn = torch_decoder(weights, weights["_vq_vae._embedding"][codes].reshape(6, 4, 4, 512).permute(0, 3, 1, 2))[:, 0]
    assert drawn.std() > 0.5
    np.testing.assert_allclose(codec.decode(codes), drawn, atol=2e-5 * float(drawn.abs().max()))


def test_files_go_both_ways(published, tmp_path):
    file, weights = published
    back = tensors(load_codec(file))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)
    small = load_codec(digits.CODEC)  # of other widths
    save_codec(tmp_path / "vae-small.safetensors", small)
    assert (tmp_path / "vae-small.safetensors").read_bytes() == digits.CODEC.read_bytes()


def test_wrong_files(published, tmp_path):
    _, weights = published
    with pytest.raises(ValueError, match=r"encoder\.4\.weight \[64, 32, 4, 4\], decoder\.8\.bias \[32\]$"):
        from_tensors({name: value for name, value in weights.items() if name not in ("encoder.4.weight", "decoder.8.bias")})
    with pytest.raises(ValueError, match=r"decoder\.6\.weight \[128, 64, 4, 4\]"):
        from_tensors(weights | {"decoder.6.weight": weights["decoder.6.weight"].transpose(1, 0, 2, 3)})
    with pytest.raises(ValueError, match=r"of 47 tensors it lacks .*, \.\.\."):
        from_tensors({})
    np.savez(tmp_path / "pickled.npz", **{"encoder.0.weight": np.array([{}], object)})
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name in ("pickled.npz", "other.safetensors", "cut.npz", "cut.safetensors", "one.npy", "nowhere.npz"):
        with pytest.raises(ValueError, match=name):
            load_codec(tmp_path / name)


@pytest.mark.parametrize("codes", [np.zeros((1, 15)), np.full((1, 16), 128), np.full((1, 16), -1)])
def test_what_is_no_code(codes):
    with pytest.raises(ValueError, match="pass"):
        load_codec(digits.CODEC).decode(codes)
    with pytest.raises(ValueError, match="pass"):
        load_codec(digits.CODEC).encode(np.zeros((1, 32, 32)))


def test_square_cuts_a_mask_out_along_its_box():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 100:140] = True
    found = crop_mask(mask, (100, 20, 180, 60))
    assert found.dtype == np.float32 and (found[:, :31] == 1).all() and (found[:, 33:] == 0).all()
    assert crop_mask(mask, (0, 0, 200, 100)).mean() == pytest.approx(mask.mean(), abs=0.01)


def test_embedded_codec():
    """Of digits that its training never saw, at most 3 MB."""
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    codec = load_codec(digits.CODEC)
    found = mask_codec.overlaps(codec, digits.shapes(digits.glyphs(held_out=True).alpha))
    assert found.mean() > 0.92 and np.quantile(found, 0.05) > 0.85 and digits.CODEC.stat().st_size < 3e6
    assert {str(value.dtype) for value in load_file(digits.CODEC).values()} == {"float16"}


def test_masks_of_a_picture_to_codes_and_back():
    """As training data are made: the mask of a whole picture, cut out, encoded, written, read and pasted again."""
    pytest.importorskip("sklearn", reason="the held-out digits are scikit-learn's: install the extra train")
    scenes, codec = digits.compose(np.random.default_rng(0), digits.glyphs(held_out=True), 8, (480, 640)), load_codec(digits.CODEC)
    assert scenes.masks is not None
    for mask, (top, left, bottom, right) in zip(scenes.masks[:, 0], scenes.boxes[:, 0].tolist()):
        (drawn,) = codec.decode(codec.encode(crop_mask(mask, (left, top, right, bottom))[None]))
        back = paste(drawn, (left, top, right, bottom), (640, 480))
        assert (back & mask).sum() / (back | mask).sum() > 0.85
        assert not back[:top].any() and not back[:, right:].any()


def test_predictor_finds_its_codec(random_directory):
    assert pg.load("tiny").codec_file == digits.CODEC
    directory = random_directory()
    with pytest.raises(ValueError, match=r"vae-oid\.npz"):
        pg.load(directory).segment(np.zeros((8, 8, 3), np.uint8), "cat")
    (directory / "vae-digits.safetensors").write_bytes(digits.CODEC.read_bytes())
    assert pg.load(directory).codec.codebook.shape[0] == 128


@pytest.mark.slow
def test_the_recipe_learns():
    """Thirty steps each way: the loss falls, codes are in use."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: install the extra train")
    shapes = digits.shapes(digits.glyphs(held_out=True).alpha)
    before, after = MaskCodec(1, 4), mask_codec.train(1, 4, 60, shapes)
    assert mask_codec.overlaps(after, shapes).mean() > mask_codec.overlaps(before, shapes).mean() + 0.1 and np.unique(after.encode(shapes)).size > 20


def test_k_means():
    """Every centre is the mean of the points that are nearest to it, and they are nearer than random points would be."""
    points = np.random.default_rng(0).normal(size=(500, 3))
    found = mask_codec.k_means(points, 8, rounds=100)
    distances = ((points[:, None] - found) ** 2).sum(-1)
    nearest = distances.argmin(1)
    np.testing.assert_allclose(found, [points[nearest == n].mean(0) for n in range(8)], atol=1e-6)
    assert distances.min(1).mean() < 0.8 * ((points[:, None] - points[:8]) ** 2).sum(-1).min(1).mean()
