"""Pixels with the settings of a directory, against transformers' own image processor (its PIL
backend) on that directory, bit by bit; and every setting that is refused."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image
from support.mutations import mutations
from transformers import AutoImageProcessor

from paligemma_jax.processing.image import load_image, pixel_values
from paligemma_jax.processing.image_settings import ImageSettings, read_image_settings

SIZE, TOKENS = 28, 4
RELEASE_4 = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": TOKENS,
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "PaliGemmaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIZE, "width": SIZE},
}


def write(directory, settings, nested=False):
    """Write the settings as transformers 4 does, or nested as transformers 5 does."""
    name = "processor_config.json" if nested else "preprocessor_config.json"
    content = {"image_processor": settings} if nested else settings
    (directory / name).write_text(json.dumps(content))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Image files of every kind of color and transparency."""
    folder = tmp_path_factory.mktemp("images")
    rgba, deep = Image.fromarray(noise(40, 30, 4)), noise(40, 30).astype(np.uint16) * 3
    few = Image.fromarray(noise(40, 30, 3) // 128 * 255)
    palette = rgba.convert("RGB").quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "RGB.png": (rgba.convert("RGB"), {}),
        "L.png": (rgba.convert("L"), {}),
        "LA.png": (rgba.convert("LA"), {}),
        "RGBA.png": (rgba, {}),
        "1.png": (rgba.convert("1"), {}),
        "palette.png": (palette, {}),
        "palette-alpha.png": (palette, {"transparency": bytes(range(0, 256, 16))}),
        "palette-key.gif": (palette, {"transparency": 3}),
        "key.png": (few, {"transparency": (255, 0, 255)}),
        "gray-key.png": (Image.fromarray(noise(40, 30) // 64), {"transparency": 2}),
        "16-bit.png": (Image.fromarray(deep), {}),
        "CMYK.jpg": (rgba.convert("CMYK"), {}),
        "rotated.jpg": (rgba.convert("RGB"), {"exif": exif}),
        "square.png": (Image.fromarray(noise(SIZE, SIZE, 3)), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in images}


@cache
def transformers_processor(directory):
    return AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)


def transformers_pixels(directory, source):
    source = source if isinstance(source, Image.Image) else str(source)
    pixels = transformers_processor(str(directory))(source, return_tensors="np")["pixel_values"]
    return pixels.astype(np.float32).transpose(0, 2, 3, 1)


def our_pixels(directory, source):
    return pixel_values([source], SIZE, read_image_settings(directory, SIZE, TOKENS))


FOLLOWED = {
    "release 4": {},
    "release 5": {"do_convert_rgb": True},
    "do_convert_rgb false": {"do_convert_rgb": False},
    "mean and deviation": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.3, 1]},
    "one mean and deviation": {"image_mean": 0.3, "image_std": 2, "do_convert_rgb": True},
    "rescale_factor": {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]},
    "do_rescale false": {"do_rescale": False, "image_mean": [100.5, 3, 0]},
    "do_normalize false": {"do_normalize": False},
    "flags null": {"do_normalize": None, "do_rescale": None},
    "size as a list": {"size": [SIZE, SIZE]},
    "a fast processor": {"image_processor_type": "SiglipImageProcessorFast"},
} | {f"resample {i}": {"resample": i} for i in (0, 1, 2, 4, 5)}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("case", FOLLOWED)
def test_pixels_equal_those_of_transformers(case, files, tmp_path):
    write(tmp_path, RELEASE_4 | FOLLOWED[case])
    for name, file in files.items():
        expected = transformers_pixels(tmp_path, file)
        np.testing.assert_array_equal(our_pixels(tmp_path, file), expected, name)
    for name in ("RGB.png", "key.png", "rotated.jpg"):
        expected = transformers_pixels(tmp_path, Image.open(files[name]))
        np.testing.assert_array_equal(our_pixels(tmp_path, Image.open(files[name])), expected, name)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_without_do_convert_rgb_transparent_pixels_keep_their_color(files, tmp_path):
    """transformers refuses opened images with one or four channels then; a file keeps its
    colors, so an opened image does too."""
    write(tmp_path, RELEASE_4)
    changed = set()
    for name, file in files.items():
        ours = our_pixels(tmp_path, Image.open(file))
        if name != "rotated.jpg":
            np.testing.assert_array_equal(ours, our_pixels(tmp_path, file), name)
        if not np.array_equal(ours, pixel_values([Image.open(file)], SIZE)):
            changed.add(name)
    alpha = {"LA.png", "RGBA.png", "palette-alpha.png"}
    assert changed == alpha | {"palette-key.gif", "key.png", "gray-key.png"}
    for name in ("L.png", "RGBA.png", "palette.png"):
        with pytest.raises(ValueError, match="must have"):
            transformers_pixels(tmp_path, Image.open(files[name]))
    rgba = noise(40, 30, 4)
    np.testing.assert_array_equal(load_image(rgba, on_white=False), rgba[..., :3])


def test_do_resize_false_requires_the_size_of_the_model(files, tmp_path):
    write(tmp_path, RELEASE_4 | {"do_resize": False, "size": None})
    expected = transformers_pixels(tmp_path, files["square.png"])
    np.testing.assert_array_equal(our_pixels(tmp_path, files["square.png"]), expected)
    with pytest.raises(ValueError, match=r"28x28 pixels because do_resize is false.*got 30x40"):
        our_pixels(tmp_path, files["RGB.png"])


MEANS = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]


@pytest.mark.parametrize(
    "nested, flat, mean",
    [(MEANS[0], None, MEANS[0]), (MEANS[0], MEANS[1], MEANS[0]), (None, MEANS[1], MEANS[1])],
)
def test_which_file_comes_first(nested, flat, mean, files, tmp_path):
    """processor_config.json does, unless it has no `image_processor`, as release 4 wrote it."""
    if flat:
        write(tmp_path, RELEASE_4 | {"image_mean": flat})
        (tmp_path / "processor_config.json").write_text('{"processor_class": "P"}')
    if nested:
        write(tmp_path, RELEASE_4 | {"image_mean": nested}, nested=True)
    assert read_image_settings(tmp_path, SIZE, TOKENS).mean == tuple(mean)
    expected = transformers_pixels(tmp_path, files["RGB.png"])
    np.testing.assert_array_equal(our_pixels(tmp_path, files["RGB.png"]), expected)


def test_without_files_the_settings_are_the_published_ones(tmp_path):
    assert read_image_settings(tmp_path, SIZE, TOKENS) == ImageSettings()
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PaliGemmaProcessor"}')
    assert read_image_settings(tmp_path, SIZE, TOKENS) == ImageSettings()
    published = {key: value for key, value in RELEASE_4.items() if key != "do_convert_rgb"}
    write(tmp_path, published)
    assert read_image_settings(tmp_path, SIZE, TOKENS) == ImageSettings()


REFUSED = {
    "another type": ({"image_processor_type": "CLIPImageProcessor"}, "SiglipImageProcessor, got"),
    "center crop": ({"do_center_crop": True}, "do_center_crop is not supported"),
    "padding": ({"do_pad": True}, "do_pad is not supported"),
    "channels first": ({"input_data_format": "channels_first"}, "input_data_format is not"),
    "another size": ({"size": {"height": 56, "width": 56}}, "got {'height': 56, 'width': 56}: use"),
    "shortest edge": ({"size": {"shortest_edge": SIZE}}, "got {'shortest_edge': 28}: use the"),
    "one number": ({"size": SIZE}, "image_size in config.json, got 28: use"),
    "the default of 224 pixels": ({"size": None}, "got {'height': 224, 'width': 224}"),
    "image tokens": ({"image_seq_length": 256}, "image_seq_length must be 4, .* got 256"),
    "two means": (
        {"image_mean": [0.5, 0.5]},
        "image_mean must be an array of length of at least 3, got an array of 2",
    ),
    "mean of text": ({"image_mean": "0.5"}, "image_mean must be .*a number"),
    "mean null": ({"image_mean": None}, "image_mean must be .*got null"),
    "deviation of zero": ({"image_std": 0}, "image_std must be a number"),
    "a huge factor": ({"rescale_factor": 1e300}, "rescale_factor must be a number"),
    "filter": ({"resample": 6}, "resample must be an integer"),
    "filter by name": ({"resample": "bicubic"}, "resample must be an integer, got 'bicubic'"),
    "flag as number": ({"do_resize": 1}, "do_resize must be true or false or null, got 1"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_other_settings_are_refused(case, nested, tmp_path):
    change, sentence = REFUSED[case]
    write(tmp_path, RELEASE_4 | change, nested)
    with pytest.raises(ValueError, match=sentence) as error:
        read_image_settings(tmp_path, SIZE, TOKENS)
    name = "processor_config.json" if nested else "preprocessor_config.json"
    assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_mutated_files_are_refused_or_followed(nested, files, tmp_path):
    """Every value replaced by values of other types: one line, or the pixels of transformers."""
    whole = {**RELEASE_4, "do_center_crop": False, "do_pad": None, "input_data_format": None}
    file = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    followed = 0
    for text in mutations({"image_processor": whole} if nested else whole):
        file.write_text(text)
        try:
            ours = our_pixels(tmp_path, files["key.png"])
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, text[:300]
            continue
        transformers_processor.cache_clear()
        try:
            theirs = transformers_pixels(tmp_path, files["key.png"])
        except Exception:
            continue
        np.testing.assert_array_equal(ours, theirs, text)
        followed += 1
    assert followed > 20
