"""Pixels against transformers' SiglipImageProcessorPil, bit by bit, for every kind of source."""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from transformers import SiglipImageProcessorPil

from paligemma_jax.processing.image import load_image, pixel_values


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_equals_transformers(source, size=28):
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    theirs = processor(str(source) if isinstance(source, Path) else source, return_tensors="np")
    ours = pixel_values([source], size)
    assert ours.dtype == np.float32 and ours.shape == (1, size, size, 3)
    np.testing.assert_array_equal(ours, theirs["pixel_values"].transpose(0, 2, 3, 1))


def in_mode(mode):
    image = Image.fromarray(noise(40, 30, 4))
    if mode in ("HSV", "LAB", "YCbCr"):
        image = image.convert("RGB")
    return image.convert(mode)


SHAPES = [
    ((100, 70, 4), 224),
    ((100, 70), 224),
    ((70, 100, 3), 224),
    ((480, 640, 3), 224),
    ((224, 224, 3), 224),
    ((1, 1, 3), 28),
    ((900, 7, 4), 448),
]


@pytest.mark.parametrize("shape, size", SHAPES)
def test_pixels_are_equal_bit_by_bit(shape, size, tmp_path):
    image = Image.fromarray(noise(*shape))
    assert_equals_transformers(image, size)
    image.save(tmp_path / "image.png")
    assert_equals_transformers(tmp_path / "image.png", size)
    image.convert("RGB").save(tmp_path / "image.jpg")
    assert_equals_transformers(tmp_path / "image.jpg", size)
    assert_equals_transformers(Image.open(tmp_path / "image.jpg"), size)


def test_smooth_images_are_equal_bit_by_bit():
    x, y = np.meshgrid(np.linspace(0, 255, 321), np.linspace(0, 255, 123))
    for size in (28, 224, 896):
        assert_equals_transformers(np.stack([x, y, 255 - x], -1).astype(np.uint8), size)


MODES = ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"]
FILES = ["L.png", "LA.png", "P.gif", "1.png", "RGBA.png", "RGBA.webp", "CMYK.jpg", "LAB.tiff"]


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    assert_equals_transformers(in_mode(mode))


@pytest.mark.parametrize("file", FILES)
def test_modes_in_files(file, tmp_path):
    path = tmp_path / file
    in_mode(path.stem).save(path)
    assert_equals_transformers(path)
    assert_equals_transformers(Image.open(path))
    np.testing.assert_array_equal(load_image(path), load_image(str(path)))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparency_of_a_palette_and_of_gray(tmp_path):
    """The `transparency` entry of a PNG without alpha channel. That of a palette is composited on
    white only for an opened image."""
    gray, palette = tmp_path / "gray.png", tmp_path / "palette.png"
    Image.fromarray(noise(40, 30) // 16).save(gray, transparency=3)
    quantized = Image.fromarray(noise(40, 30, 3)).quantize(16)
    quantized.save(palette, transparency=bytes(range(0, 256, 16)))
    for path in (gray, palette):
        assert Image.open(path).info.get("transparency") is not None
        assert_equals_transformers(path)
        assert_equals_transformers(Image.open(path))
    assert not np.array_equal(load_image(palette), load_image(Image.open(palette)))


def test_alpha_is_composited_on_white():
    values = np.arange(256, dtype=np.uint8)
    every_value_at_every_alpha = np.stack(np.meshgrid(values, values), -1)[..., [0, 0, 0, 1]]
    for array in (noise(9, 9, 4), every_value_at_every_alpha):
        assert_equals_transformers(array)
        assert_equals_transformers(Image.fromarray(array))
    pixel = np.full((1, 1, 4), [200, 200, 200, 60], np.uint8)
    assert load_image(pixel).getpixel((0, 0)) == (242, 242, 242)


def test_16_bit_images(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 600, (40, 30)).astype(np.uint16))
    image.save(tmp_path / "image.png")
    for source in (image, image.convert("I"), image.convert("F"), tmp_path / "image.png"):
        assert_equals_transformers(source)


def test_arrays():
    for shape in [(40, 30, 1), (40, 30, 3), (40, 30, 4)]:
        assert_equals_transformers(noise(*shape))
    gray, strided = noise(40, 30), noise(40, 30, 3)[::-1, ::2]
    # transformers refuses [H, W].
    np.testing.assert_array_equal(load_image(gray), load_image(gray[..., None]))
    np.testing.assert_array_equal(load_image(strided), strided)


def test_arrays_of_other_libraries_and_floats():
    """Floats in [0, 1] are rounded to uint8. (transformers would rescale them twice, to black.)"""
    array = noise(40, 30, 3)
    unit = array / 255
    sources = [jnp.asarray(array), torch.from_numpy(array), torch.from_numpy(unit).requires_grad_()]
    sources += [unit, unit.astype(np.float32), jnp.asarray(unit), torch.from_numpy(unit).float()]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), array)
    coarse = (noise(40, 30, 3) // 2 * 2).astype(np.float32) / 256  # exact in bfloat16
    expected = np.round(coarse * 255)
    for source in (jnp.asarray(coarse, jnp.bfloat16), torch.from_numpy(coarse).bfloat16()):
        np.testing.assert_array_equal(load_image(source), expected)
    transparent = noise(40, 30, 4)
    np.testing.assert_array_equal(load_image(transparent / 255), load_image(transparent))


def test_encoded_bytes_are_read_like_a_file(tmp_path):
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 30, 4)).save(path, exif=exif)
    content = path.read_bytes()
    for source in (
        content,
        {"bytes": content, "path": None},
        {"bytes": content, "path": "elsewhere.png"},
        {"bytes": None, "path": str(path)},
        {"path": str(path)},
    ):
        np.testing.assert_array_equal(load_image(source), load_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """A file is rotated, an opened image is not, as in transformers."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(noise(40, 30, 3)).save(path, exif=exif)
    assert_equals_transformers(path)
    assert_equals_transformers(Image.open(path))
    np.testing.assert_array_equal(load_image(path), ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(load_image(Image.open(path)), noise(40, 30, 3))


def test_several_images_are_stacked():
    images = [noise(20, 30, 3), noise(50, 10, 4, seed=1), Image.fromarray(noise(8, 8))]
    pixels = pixel_values(images, 14)
    one_by_one = np.concatenate([pixel_values([image], 14) for image in images])
    np.testing.assert_array_equal(pixels, one_by_one)
    assert pixels.min() >= -1 and pixels.max() <= 1
    black_and_white = np.array([[0, 255]], np.uint8).repeat(2, 0)
    assert pixel_values([black_and_white], 2)[0, 0, :, 0].tolist() == [-1, 1]


def assert_error(source, *parts):
    with pytest.raises(ValueError) as error:
        pixel_values([source], 28)
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    complete = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9):
        path.write_bytes(complete[: int(len(complete) * fraction)])
        assert_error(path, path.name)
        try:
            image = Image.open(path)  # reads the header only
        except Exception:
            continue
        assert_error(image)


def test_a_corrupted_png_is_refused(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    assert_error(path, path.name)


def test_sources_that_are_not_images_are_refused(tmp_path):
    (tmp_path / "image.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    assert_error(tmp_path / "image.png", "image.png", "not an image")
    assert_error(tmp_path / "empty.png", "empty.png")
    assert_error(tmp_path / "absent.png", "no image file", "absent.png")
    assert_error(str(tmp_path), "no image file")
    assert_error("https://example.com/cat.png", "download the URL")
    assert_error(None, "NoneType")
    assert_error([noise(4, 4)], "list")
    assert_error(Image.new("RGB", (0, 5)), "0x5")
    assert_error(b"<html>404</html>", "16 bytes", "not an image")
    assert_error({"bytes": "text", "path": None}, "content as bytes", "str")
    assert_error({"path": None}, "content as bytes", "NoneType")
    assert_error({"image": b""}, "'bytes' and 'path'", "'image'")
    assert_error(torch.zeros(4, 4, 3, device="meta"), "Tensor", "pass a numpy array")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    assert_error(path, "image.png", "too large", "MAX_IMAGE_PIXELS")


def progressive_jpeg(repeated_scans):
    """A JPEG of ten scans, whose last one is repeated."""
    stream = io.BytesIO()
    thumbnail = b"\xff\xd8\xff\xda\xff\xda\xff\xd9"
    image = Image.fromarray(noise(64, 64, 3))
    image.save(stream, "JPEG", progressive=True, comment=thumbnail * 200)
    jpeg = stream.getvalue()
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * repeated_scans + jpeg[-2:]


def test_a_jpeg_of_many_scans_is_refused_without_decoding_it(tmp_path, monkeypatch):
    path = tmp_path / "image.jpg"
    path.write_bytes(progressive_jpeg(90))
    assert load_image(path).size == (64, 64)
    path.write_bytes(progressive_jpeg(91))
    monkeypatch.setattr(JpegImageFile, "load", lambda self: pytest.fail("decoded"))
    assert_error(path, "image.jpg", "100 scans", "got 101")
    assert_error(path.read_bytes(), "100 scans", "got 101")


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(b"")
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=denied))
    assert_error(path, "image.png", "Permission denied")


BAD_SHAPES = [(5,), (5, 5, 2), (5, 5, 5), (2, 5, 5, 3), (0, 5, 3), (5, 0), (3, 0, 5), ()]


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_an_array_of_another_shape_is_refused(shape):
    assert_error(np.zeros(shape, np.uint8), "[H, W, 3]", str(list(shape)))


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray, torch.from_numpy])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_refused(channels, library):
    array = np.zeros((channels, 20, 30), np.uint8)
    assert_error(library(array), "channels last", str([channels, 20, 30]), "permute(1, 2, 0)")


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint16, bool, complex])
def test_an_array_of_another_dtype_is_refused(dtype):
    assert_error(np.zeros((5, 5, 3), dtype), "uint8", "float (0 to 1)", np.dtype(dtype).name)


@pytest.mark.parametrize(
    "value, found", [(255.0, "0 to 255"), (-0.5, "-0.5 to 0"), (np.nan, "nan")]
)
def test_floats_outside_of_0_to_1_are_refused(value, found):
    array = np.zeros((5, 5, 3))
    array[2, 2, 2] = value
    assert_error(array, "values in [0, 1]", found, "pass uint8")
