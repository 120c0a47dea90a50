"""The mask codec: the published network, restated in torch; its files; errors."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import paligemma_jax as pg
from paligemma_jax.processing.mask_codec import (
    MaskCodec,
    crop_mask,
    from_tensors,
    load_codec,
    save_codec,
    tensors,
)
from paligemma_jax.tiny.digits import CODEC

# The tensors of vae-oid.npz: the network of arXiv:2301.02229 in the sizes of
# configs/insseg/ait_insseg_vqvae.py.
SHAPES = {
    "encoder.0": (16, 1, 4, 4),
    "encoder.2": (32, 16, 4, 4),
    "encoder.4": (64, 32, 4, 4),
    "encoder.6": (128, 64, 4, 4),
    "encoder.10": (512, 128, 1, 1),
    "decoder.0": (128, 512, 1, 1),
    "decoder.4": (128, 128, 4, 4),
    "decoder.6": (128, 64, 4, 4),
    "decoder.8": (64, 32, 4, 4),
    "decoder.10": (32, 16, 4, 4),
    "decoder.12": (1, 16, 1, 1),
}
SHAPES |= {
    f"{block}.net.{n}": (128, 128, kernel, kernel)
    for block in ("encoder.8", "encoder.9", "decoder.2", "decoder.3")
    for n, kernel in ((0, 3), (2, 3), (4, 1))
}
TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights under the published names and shapes, in an .npz as numpy writes it."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        fan_in = shape[0] * 4 if name in TRANSPOSED else np.prod(shape[1:])
        kernel = rng.normal(size=shape) * (2 / fan_in) ** 0.5
        weights[f"{name}.weight"] = kernel.astype(np.float32)
        size = shape[1] if name in TRANSPOSED else shape[0]
        weights[f"{name}.bias"] = rng.normal(0, 0.2, size).astype(np.float32)
    weights["_vq_vae._embedding"] = rng.normal(size=(128, 512)).astype(np.float32)
    file = tmp_path_factory.mktemp("codec") / "vae-oid.npz"
    np.savez(file, **weights, **{"_vq_vae._ema_w": np.ones(3)})
    return file, weights


def parameters_of(weights, name):
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def torch_encoder(weights, images):
    """[B, 1, 64, 64] in 0..1 -> [B, 512, 4, 4], with torch's own functions."""
    import torch.nn.functional as f

    x = 2 * images - 1
    for n in (0, 2, 4, 6):
        x = f.relu(f.conv2d(x, *parameters_of(weights, f"encoder.{n}"), stride=2, padding=1))
    for n in (8, 9):
        x = torch_residual(weights, f"encoder.{n}.net", x)
    return f.conv2d(x, *parameters_of(weights, "encoder.10"))


def torch_decoder(weights, x):
    """[B, 512, 4, 4] -> [B, 1, 64, 64]"""
    import torch.nn.functional as f

    x = f.relu(f.conv2d(x, *parameters_of(weights, "decoder.0")))
    for n in (2, 3):
        x = torch_residual(weights, f"decoder.{n}.net", x)
    for name in TRANSPOSED:
        x = f.relu(f.conv_transpose2d(x, *parameters_of(weights, name), stride=2, padding=1))
    return f.conv2d(x, *parameters_of(weights, "decoder.12"))


def torch_residual(weights, name, x):
    import torch.nn.functional as f

    y = f.relu(f.conv2d(x, *parameters_of(weights, f"{name}.0"), padding=1))
    y = f.relu(f.conv2d(y, *parameters_of(weights, f"{name}.2"), padding=1))
    return x + f.conv2d(y, *parameters_of(weights, f"{name}.4"))


def test_the_published_network_matches_torch(published):
    """Encoder, codes and decoder, on weights of the published shapes."""
    torch = pytest.importorskip(
        "torch", reason="the network is restated in torch: install the extra test"
    )
    file, weights = published
    weights = {name: torch.tensor(value) for name, value in weights.items()}
    codebook = weights["_vq_vae._embedding"]
    codec, rng = load_codec(file), np.random.default_rng(1)
    images = rng.random((6, 64, 64)).astype(np.float32)
    expected = torch_encoder(weights, torch.tensor(images)[:, None]).permute(0, 2, 3, 1)
    embedded = np.asarray(jax.jit(MaskCodec.embed)(codec, images))
    assert expected.std() > 0.5
    np.testing.assert_allclose(embedded, expected, atol=2e-5 * float(expected.abs().max()))
    distances = torch.cdist(expected.reshape(-1, 512).double(), codebook.double())
    np.testing.assert_array_equal(codec.encode(images), distances.argmin(1).reshape(6, 16))
    codes = rng.integers(0, 128, (6, 16))
    vectors = codebook[codes].reshape(6, 4, 4, 512).permute(0, 3, 1, 2)
    drawn = torch_decoder(weights, vectors)[:, 0]
    assert drawn.std() > 0.5
    np.testing.assert_allclose(codec.decode(codes), drawn, atol=2e-5 * float(drawn.abs().max()))


def test_files_survive_a_round_trip(published, tmp_path):
    file, weights = published
    loaded = tensors(load_codec(file))
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded[name], value)
    save_codec(tmp_path / "vae-small.safetensors", load_codec(CODEC))  # of other widths
    assert (tmp_path / "vae-small.safetensors").read_bytes() == CODEC.read_bytes()


def test_wrong_files_are_refused(published, tmp_path):
    _, weights = published
    some = {n: v for n, v in weights.items() if n not in ("encoder.4.weight", "decoder.8.bias")}
    missing = r"encoder\.4\.weight \[64, 32, 4, 4\], decoder\.8\.bias \[32\]$"
    with pytest.raises(ValueError, match=missing):
        from_tensors(some)
    with pytest.raises(ValueError, match=r"decoder\.6\.weight \[128, 64, 4, 4\]"):
        kernel = weights["decoder.6.weight"].transpose(1, 0, 2, 3)
        from_tensors(weights | {"decoder.6.weight": kernel})
    with pytest.raises(ValueError, match=r"47 of 47 tensors are missing .*, \.\.\."):
        from_tensors({})
    np.savez(tmp_path / "pickled.npz", **{"encoder.0.weight": np.array([{}], object)})
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    names = ("pickled.npz", "other.safetensors", "cut.npz", "cut.safetensors", "array.npy")
    for name in (*names, "nowhere.npz"):
        with pytest.raises(ValueError, match=name):
            load_codec(tmp_path / name)


@pytest.mark.parametrize("codes", [np.zeros((1, 15)), np.full((1, 16), 128), np.full((1, 16), -1)])
def test_invalid_codes_and_masks_are_refused(codes):
    with pytest.raises(ValueError, match="codes must be"):
        load_codec(CODEC).decode(codes)
    with pytest.raises(ValueError, match="masks must be"):
        load_codec(CODEC).encode(np.zeros((1, 32, 32)))


def test_crop_mask_cuts_a_mask_out_along_its_box():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 100:140] = True
    cropped = crop_mask(mask, (100, 20, 180, 60))
    assert cropped.dtype == np.float32
    assert (cropped[:, :31] == 1).all() and (cropped[:, 33:] == 0).all()
    assert crop_mask(mask, (0, 0, 200, 100)).mean() == pytest.approx(mask.mean(), abs=0.01)


def test_a_predictor_finds_the_codec_beside_its_checkpoint(random_directory):
    assert pg.load("tiny").codec_file == CODEC
    directory = random_directory()
    with pytest.raises(ValueError, match=r"vae-oid\.npz"):
        pg.load(directory).segment(np.zeros((8, 8, 3), np.uint8), "cat")
    (directory / "vae-digits.safetensors").write_bytes(CODEC.read_bytes())
    assert pg.load(directory).codec.codebook.shape[0] == 128
