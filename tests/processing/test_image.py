"""Pixels against transformers' SiglipImageProcessorPil, bit for bit, for every way to hand over an image; and the errors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import SiglipImageProcessorPil

from paligemma_jax.processing.image import load_image, pixel_values


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_as_transformers(source, size=28):
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    theirs = processor(str(source) if isinstance(source, Path) else source, return_tensors="np")
    ours = pixel_values([source], size)
    assert ours.dtype == np.float32 and ours.shape == (1, size, size, 3)
    np.testing.assert_array_equal(ours, theirs["pixel_values"].transpose(0, 2, 3, 1))


def in_mode(mode):
    rgba = Image.fromarray(noise(40, 30, 4))
    return rgba.convert("RGB").convert(mode) if mode in ("HSV", "LAB", "YCbCr") else rgba.convert(mode)


@pytest.mark.parametrize(
    "shape, size",
    [((100, 70, 4), 224), ((100, 70), 224), ((70, 100, 3), 224), ((480, 640, 3), 224), ((224, 224, 3), 224), ((1, 1, 3), 28), ((900, 7, 4), 448)],
)
def test_pixels_bit_equal(shape, size, tmp_path):
    image = Image.fromarray(noise(*shape))
    assert_as_transformers(image, size)
    image.save(tmp_path / "image.png")
    assert_as_transformers(tmp_path / "image.png", size)
    image.convert("RGB").save(tmp_path / "image.jpg")
    assert_as_transformers(tmp_path / "image.jpg", size)
    assert_as_transformers(Image.open(tmp_path / "image.jpg"), size)


def test_smooth_images_bit_equal():
    x, y = np.meshgrid(np.linspace(0, 255, 321), np.linspace(0, 255, 123))
    for size in (28, 224, 896):
        assert_as_transformers(np.stack([x, y, 255 - x], -1).astype(np.uint8), size)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"])
def test_modes(mode):
    assert_as_transformers(in_mode(mode))


@pytest.mark.parametrize("file", ["L.png", "LA.png", "P.gif", "1.png", "RGBA.png", "RGBA.webp", "CMYK.jpg", "LAB.tiff"])
def test_modes_in_files(file, tmp_path):
    in_mode(file.split(".")[0]).save(path := tmp_path / file)
    assert_as_transformers(path)
    assert_as_transformers(Image.open(path))
    np.testing.assert_array_equal(load_image(path), load_image(str(path)))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparency_of_a_palette_and_of_grey(tmp_path):
    """The `transparency` entry of a PNG without alpha channel; the palette's is composited on white only when the image is open."""
    Image.fromarray(noise(40, 30) // 16).save(grey := tmp_path / "grey.png", transparency=3)
    Image.fromarray(noise(40, 30, 3)).quantize(16).save(palette := tmp_path / "palette.png", transparency=bytes(range(0, 256, 16)))
    for path in (grey, palette):
        assert Image.open(path).info.get("transparency") is not None
        assert_as_transformers(path)
        assert_as_transformers(Image.open(path))
    assert not np.array_equal(load_image(palette), load_image(Image.open(palette)))


def test_alpha_on_white():
    for array in (noise(9, 9, 4), np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2), -1)[..., [0, 0, 0, 1]]):  # every value at every alpha
        assert_as_transformers(array)
        assert_as_transformers(Image.fromarray(array))
    assert load_image(np.full((1, 1, 4), [200, 200, 200, 60], np.uint8)).getpixel((0, 0)) == (242, 242, 242)


def test_sixteen_bits(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 600, (40, 30)).astype(np.uint16))
    image.save(tmp_path / "image.png")
    for source in (image, image.convert("I"), image.convert("F"), tmp_path / "image.png"):
        assert_as_transformers(source)


def test_arrays():
    for shape in [(40, 30, 1), (40, 30, 3), (40, 30, 4)]:
        assert_as_transformers(noise(*shape))
    np.testing.assert_array_equal(load_image(noise(40, 30)), load_image(noise(40, 30)[..., None]))  # transformers refuses [H, W]
    np.testing.assert_array_equal(load_image(noise(40, 30, 3)[::-1, ::2]), noise(40, 30, 3)[::-1, ::2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """A path is turned upright, an open image is taken as it lies, as in transformers."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(40, 30, 3)).save(path := tmp_path / "image.png", exif=exif)
    assert_as_transformers(path)
    assert_as_transformers(Image.open(path))
    np.testing.assert_array_equal(load_image(path), ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(load_image(Image.open(path)), noise(40, 30, 3))


def test_many():
    images = [noise(20, 30, 3), noise(50, 10, 4, seed=1), Image.fromarray(noise(8, 8))]
    np.testing.assert_array_equal(pixel_values(images, 14), np.concatenate([pixel_values([image], 14) for image in images]))
    assert pixel_values(images, 14).min() >= -1 and pixel_values(images, 14).max() <= 1
    assert pixel_values([np.array([[0, 255]], np.uint8).repeat(2, 0)], 2)[0, 0, :, 0].tolist() == [-1, 1]


def assert_error(source, *parts):
    with pytest.raises(ValueError) as error:
        pixel_values([source], 28)
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_file(suffix, tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(path := tmp_path / f"image.{suffix}")
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        assert_error(path, path.name)
        try:
            image = Image.open(path)  # reads the header only
        except Exception:
            continue
        assert_error(image)


def test_broken_png(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(path := tmp_path / "image.png")
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    assert_error(path, path.name)


def test_not_an_image(tmp_path):
    (tmp_path / "image.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    assert_error(tmp_path / "image.png", "image.png", "no image that PIL can read")
    assert_error(tmp_path / "empty.png", "empty.png")
    assert_error(tmp_path / "absent.png", "no image file", "absent.png")
    assert_error(str(tmp_path), "no image file")
    assert_error("https://example.com/cat.png", "URL", "downloaded")
    assert_error(None, "NoneType")
    assert_error([noise(4, 4)], "list")
    assert_error(Image.new("RGB", (0, 5)), "0x5")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(noise(64, 64, 3)).save(path := tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    assert_error(path, "image.png", "too large", "MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("shape", [(5,), (5, 5, 2), (5, 5, 5), (3, 20, 20), (2, 5, 5, 3), (0, 5, 3), (5, 0), ()])
def test_array_of_another_shape(shape):
    assert_error(np.zeros(shape, np.uint8), "[H, W, 3]", str(list(shape)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, bool])
def test_array_of_another_dtype(dtype):
    assert_error(np.zeros((5, 5, 3), dtype), "uint8", np.dtype(dtype).name)
