"""Training rows: their order, and the errors in them."""

from __future__ import annotations

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.finetuning import data  # noqa: F401
from support.mutations import mutations

from paligemma_jax.data.rows import make_example, read_examples
from paligemma_jax.processing.image import load_image
from paligemma_jax.training.batches import row_order
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune


def test_rows_are_shuffled_anew_each_epoch():
    first = row_order(10, 0, 0, 30)
    assert all(sorted(first[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert list(first[:10]) != list(first[10:20])
    np.testing.assert_array_equal(row_order(10, 0, 7, 9), first[7:16])
    assert list(row_order(10, 1, 0, 10)) != list(first[:10])


def test_unusable_rows_are_counted_and_listed(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        "{",
        '{"image": "a.png", "prefix": "x", "suffix": "y"}',
        '{"prefix": "x", "suffix": "y"}',
        '{"image": "b", "prefix": "x", "suffix": null}',
        '{"image": "broken.png", "prefix": "x", "suffix": "y"}',
        '{"image": "b", "prefix": "x", "suffix": 3}',
        "[]",
        "",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as error:
        read_examples(tmp_path / "rows.jsonl")
    message = str(error.value)
    for part in (
        "7 rows cannot be used",
        "line 1: not readable JSON",
        "line 3: image is missing",
        "line 4: suffix is missing",
        "and 2 more",
    ):
        assert part in message


def test_images_bytes_and_lengths_are_checked(data, tmp_path):  # noqa: F811
    """A truncated JPEG, a missing image, invalid UTF-8 and a long row are errors; a byte order mark
    is not."""
    Image.open(data.parent / "0.png").resize((300, 300)).save(tmp_path / "photo.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:9000])

    def row(image, prefix="ocr"):
        return json.dumps({"image": image, "prefix": prefix, "suffix": "y"}).encode()

    rows = [
        row("photo.jpg"),
        row("half.jpg"),
        row("no.jpg"),
        row("no.jpg"),
        row("no.jpg"),
        b'{"image": "\xff"}',
        row("photo.jpg", "ocr " * 9000),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows))
    with pytest.raises(ValueError) as error:
        finetune(FinetuneConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "run"), steps=1))
    message = str(error.value)
    for part in (
        "6 rows",
        "line 2: ",
        "half.jpg is not a readable image",
        "line 3: no such image",
        "line 5: ",
        "line 6: not readable JSON",
        "and 1 more",
    ):
        assert part in message
    assert "line 1: " not in message and not (tmp_path / "run").exists()
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\n" + rows[-1])
    with pytest.raises(ValueError, match=r"1 rows cannot be used: line 2: .* but the context is"):
        finetune(FinetuneConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "run"), steps=1))
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + rows[0])
    assert len(read_examples(tmp_path / "rows.jsonl")) == 1


@pytest.mark.parametrize("weight", [np.float32(0.5), np.int64(2), 3])
def test_weights_of_numpy_and_tuples_of_images_are_accepted(weight):
    row = {"image": ("a.png", "b.png"), "prefix": "ocr", "suffix": "1", "weight": weight}
    example = make_example(row, 1)
    assert example.weight == float(weight) and len(example.images) == 2


def test_images_of_every_format_of_a_data_set():
    """Hugging Face data sets: decoded or not, and in the formats numpy, jax and torch, of which
    the last has the channels first."""
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(0).integers(0, 256, (16, 19, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    images = [Image.fromarray(array), {"bytes": stream.getvalue(), "path": None}, array]
    images += [jnp.asarray(array), torch.from_numpy(array).permute(2, 0, 1)]
    for image in images:
        example = make_example({"image": image, "prefix": "ocr", "suffix": "1"}, 0)
        np.testing.assert_array_equal(load_image(example.images[0]), array)


def test_a_weight_of_null_is_absent_and_an_array_without_axes_is_a_number():
    row = {"image": "a.png", "prefix": "ocr", "suffix": "1"}
    for weight, value in ((None, 1), (np.array(2.0), 2), (jnp.array(3), 3)):
        assert make_example(row | {"weight": weight}, 1).weight == value


def test_lists_of_images_may_be_stacked_or_not_decoded(tmp_path):
    """As the formats numpy and jax of Hugging Face's data sets give them, and decode=False."""
    row = {"prefix": "ocr", "suffix": "1"}
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    for stacked in (pixels, jnp.array(pixels)):
        images = make_example(row | {"image": stacked}, 1).images
        assert [load_image(image).size for image in images] == [(5, 4), (5, 4)]
    encoded = io.BytesIO()
    Image.fromarray(pixels[0]).save(encoded, "PNG")
    given = [{"bytes": encoded.getvalue(), "path": "x"}, {"bytes": None, "path": "a.png"}]
    first, second = make_example(row | {"image": given}, 1, tmp_path).images
    np.testing.assert_array_equal(load_image(first), pixels[0])
    assert second == tmp_path / "a.png"
    for wrong in ({}, {"bytes": "text", "path": "a.png"}, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="image must be a path, an image, or a list"):
            make_example(row | {"image": wrong}, 1)


WRONG_ROWS = {
    "a row must be an object with image, prefix and suffix, got an array of 0 items": [],
    "image is missing": {"image": None},
    "image must be a path, an image, or a list of them, got 3": {"image": 3},
    "image must be a path, an image, or a list of them, got an array of 0 items": {"image": []},
    "prefix must be a string, got 7": {"prefix": 7},
    "suffix must be a string, got an array of 1 item": {"suffix": ["x"]},
    "suffix is missing": {"suffix": None},
    "weight must be a finite number of at least 0 in float32, got 1e+39": {"weight": 1e39},
    "weight must be a finite number of at least 0 in float32, got true": {"weight": True},
    "weight must be a finite number of at least 0 in float32, got 1000000": {"weight": 10**999},
    "weight must be a finite number of at least 0 in float32, got '1'": {"weight": "1"},
}


@pytest.mark.parametrize("error", WRONG_ROWS)
def test_fields_of_the_wrong_type_are_refused(error):
    row, change = {"image": "a.png", "prefix": "ocr", "suffix": "1"}, WRONG_ROWS[error]
    with pytest.raises(ValueError, match=re.escape(error)):
        make_example(row | change if isinstance(change, dict) else change, 1)


def test_rows_of_any_json_are_read_or_refused_with_their_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"image": ["a.png"], "prefix": "ocr", "suffix": "1", "weight": 2.0, "more": [{}]}
    for text in mutations(row):
        file.write_text(text + "\n")
        try:
            read_examples(file)
        except ValueError as error:
            assert f"{file}: 1 rows cannot be used: line 1: " in str(error)
            assert len(str(error)) < 400


class DatasetDict(dict):
    """A stand-in for that of the datasets library."""


def test_a_dict_of_splits_is_refused_by_name(data, tmp_path):  # noqa: F811
    splits = DatasetDict(train=[], validation=[])
    with pytest.raises(
        ValueError,
        match=r"data must be the rows of one split, got a DatasetDict of train, validation: "
        r"pass data\['train'\]",
    ):
        finetune(FinetuneConfig(str(data), str(tmp_path / "run"), steps=1), data=splits)


def test_a_file_without_rows_is_refused(tmp_path):
    for text in ("", "\n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(ValueError, match="has no rows"):
            read_examples(tmp_path / "empty.jsonl")
