"""What a loaded checkpoint takes from the files beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hf_processor import save_processor
from transformers import AutoImageProcessor, AutoProcessor, SiglipImageProcessorPil

import paligemma_jax as pg
from convert import formats, orbax
from convert.inspection import inspect
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference.loading import make_processor

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def image_processor(size, tokens):
    return SiglipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[0.485, 0.456, 0.406],
        resample=2,
        image_seq_length=tokens,
    )


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_image_settings_survive_conversion(file, random_directory, tmp_path):
    """Also at another resolution, for which `convert` edits the files. The reference is
    transformers' processor (PIL) of the converted directory."""
    directory = random_directory()
    settings = image_processor(56, 16).to_dict()
    content = settings if file.startswith("pre") else {"image_processor": settings}
    (directory / file).write_text(json.dumps(content))
    for resolution, to in ((56, "jax"), (28, "jax"), (28, "huggingface")):
        converted = tmp_path / f"{to}-{resolution}"
        formats.convert(directory, converted, to, resolution=resolution)
        ours = make_processor(resolve(converted))
        files = converted / orbax.FILES if to == "jax" else converted
        theirs = AutoImageProcessor.from_pretrained(files, backend="pil", local_files_only=True)
        assert theirs.image_seq_length == ours.image_tokens == (resolution // 14) ** 2
        pixels = theirs(IMAGE, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(ours(IMAGE, "caption en").images, pixels)


def test_settings_of_another_model_are_refused(random_directory):
    directory = random_directory()
    image_processor(224, 256).save_pretrained(directory)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: size must be .*'height': 56"):
        make_processor(resolve(directory))


@pytest.fixture
def without_model(random_directory) -> Path:
    """A checkpoint as release 5 of transformers saves it, without tokenizer.model."""
    directory = random_directory()
    save_processor(directory, 56, 14)
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.add_tokens(["zebra"])
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<cell>"]})
    processor.save_pretrained(directory)
    (directory / "tokenizer.model").unlink()
    return directory


def test_tokenizer_json_travels_through_conversions(without_model, tmp_path):
    theirs = AutoProcessor.from_pretrained(without_model).tokenizer
    pg.convert(without_model, tmp_path / "jax", "jax")
    pg.convert(tmp_path / "jax", tmp_path / "back", "huggingface")
    for directory in (without_model, tmp_path / "jax", tmp_path / "back"):
        ours = make_processor(resolve(directory)).tokenizer
        ids = ours.encode("cat<cell> zebra")
        assert ids == theirs.encode("cat<cell> zebra", add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "cat zebra"
        assert not any("tokenizer" in note for note in inspect(directory)["notes"])


def test_without_a_tokenizer_the_error_names_both_files(random_directory):
    directory = random_directory()
    (directory / "tokenizer.model").unlink()
    with pytest.raises(
        ValueError, match=r"no tokenizer at .*: copy tokenizer\.json or tokenizer\.m"
    ):
        pg.load(directory)
    assert "it has no tokenizer.json or tokenizer.model" in inspect(directory)["notes"][-1]


@pytest.mark.parametrize("content", ["[]", "{", "[" * 5000, '{"size": {"height": NaN}}'])
def test_a_file_that_convert_cannot_edit_is_refused(content, random_directory, tmp_path):
    directory = random_directory()
    (directory / "preprocessor_config.json").write_text(content)
    for options in ({"dtype": "bfloat16"}, {"resolution": 28}):
        with pytest.raises(ValueError, match=r"preprocessor_config.json.* (object|JSON)"):
            formats.convert(directory, tmp_path / "out", "huggingface", **options)
    assert not (tmp_path / "out").exists()
