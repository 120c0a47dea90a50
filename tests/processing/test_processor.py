"""Inputs against transformers' PaliGemmaProcessor, array by array, and every error."""

from __future__ import annotations

import random
from collections import deque

import jax
import numpy as np
import pytest
from PIL import Image
from support.hf_processor import hf_processor, train_tokenizer

from paligemma_jax.processing.processor import Inputs, Processor
from paligemma_jax.processing.tokenizer import Tokenizer

SIZE, PATCH, TOKENS = 28, 14, 4


@pytest.fixture(scope="module", params=["inside", "outside"])
def directory(request, tmp_path_factory):
    """A directory whose sentencepiece model contains the `<loc>` and `<seg>` pieces, or does
    not."""
    file = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    return train_tokenizer(file, added=request.param == "inside").parent


@pytest.fixture(scope="module")
def ours(directory):
    return Processor(Tokenizer(directory / "tokenizer.model"), SIZE, TOKENS)


@pytest.fixture(scope="module")
def theirs(directory):
    return hf_processor(directory, SIZE, PATCH)


def image(seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (30 + seed, 40, 3), dtype=np.uint8))


A, B, C = image(0), image(1), image(2)


def assert_same(inputs: Inputs, hf):
    """The five arrays of Inputs equal those of transformers."""
    hf = {name: np.asarray(value) for name, value in hf.items()}
    valid, targets = hf["attention_mask"] == 1, hf["token_type_ids"] == 1
    assert [a.dtype for a in jax.tree.leaves(inputs)] == [np.int32, np.float32, bool, bool, bool]
    np.testing.assert_array_equal(inputs.tokens, hf["input_ids"])
    np.testing.assert_array_equal(inputs.valid, valid)
    np.testing.assert_array_equal(inputs.targets, targets)
    np.testing.assert_array_equal(inputs.prefix, valid & ~targets)
    labels = np.where(inputs.targets, inputs.tokens, -100)
    np.testing.assert_array_equal(labels, hf["labels"])
    np.testing.assert_array_equal(inputs.images, hf["pixel_values"].transpose(0, 2, 3, 1))


CASES = {
    "no placeholder": (A, "caption en"),
    "placeholder": (A, "<image>caption en"),
    "in the middle": (A, "answer en <image>what color is this"),
    "space after": (A, "<image> caption en"),
    "at the end": (A, "caption en<image>"),
    "newlines at the end": (A, "caption en\n\n"),
    "literal bos": (A, "<image><bos>caption en"),
    "literal special tokens": (A, "a<eos>b <loc0003><pad>cat<unk>"),
    "empty": (A, ""),
    "spaces, tabs, emoji": (A, "  the\tcat  😀日本語 "),
    "two images": ([[A, B]], "the cat and the dog"),
    "two images, placeholders": ([A, B], "<image>the cat<image> and the dog"),
    "two images, nested": ([[A, B]], ["<image><image>the cat"]),
    "batch": ([A, B, C], ["caption en", "detect cat ; dog", ""]),
    "batch, one list each": ([[A, B], [C]], ["the cat", "answer en what color is the car"]),
    "batch, flat, placeholders": ([A, B, C], ["<image>a<image>b", "a red car<image>"]),
    "batch, nested, placeholders": ([[A, B], [C]], ["<image>a<image>b", "<image>a red car"]),
    "batch, a row without image": ([[A], []], ["caption en", "answer en"]),
}
SUFFIXES = ["<loc0003><loc0100><loc1023><loc0007> cat", "", "a red  car\n<seg001><eos>x"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("suffix", [False, True], ids=["prompt", "suffix"])
@pytest.mark.parametrize("case", CASES)
def test_inputs_equal_those_of_transformers(case, suffix, side, ours, theirs):
    images, prompts = CASES[case]
    suffixes = None
    if suffix:
        suffixes = SUFFIXES[0] if isinstance(prompts, str) else SUFFIXES[: len(prompts)]
    hf = theirs(
        images=images,
        text=prompts,
        suffix=suffixes,
        padding="longest",
        padding_side=side,
        return_tensors="np",
    )
    inputs = ours(images, prompts, suffixes, padding_side=side)
    assert_same(inputs, hf)
    for row in inputs.tokens:
        assert ours.decode(row) == theirs.decode(row, skip_special_tokens=True)


def test_random_prompts_equal_those_of_transformers(ours, theirs):
    rng = random.Random(0)
    parts = ["<image>", "<image>", "cat", " dog", " ", "\n", "\n\n", "<bos>", "<eos>", "<loc0003>"]
    parts += ["<", "image>", "😀", "\t", "▁"]
    for _ in range(150):
        prompts = [
            "<image>" + "".join(rng.choices(parts, k=rng.randint(0, 8)))
            for _ in range(rng.randint(1, 3))
        ]
        images = rng.choices([A, B, C], k=sum(prompt.count("<image>") for prompt in prompts))
        suffixes = rng.choice([None, [rng.choice(SUFFIXES) for _ in prompts]])
        hf = theirs(images=images, text=prompts, suffix=suffixes, padding=True, return_tensors="np")
        assert_same(ours(images, prompts, suffixes), hf)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_to_a_length(side, ours, theirs):
    images, prompts, suffixes = [A, B], ["caption en", "detect cat"], ["cat", "<loc0003>"]
    hf = theirs(
        images=images,
        text=prompts,
        suffix=suffixes,
        padding="max_length",
        max_length=32,
        padding_side=side,
        return_tensors="np",
    )
    assert_same(ours(images, prompts, suffixes, padding_side=side, length=32), hf)
    longest = ours(images, prompts, suffixes).tokens.shape[1]
    assert ours(images, prompts, suffixes, length=longest).tokens.shape == (2, longest)


def test_paths_arrays_and_images_give_the_same_pixels(ours, tmp_path):
    path = tmp_path / "image.png"
    A.save(path)
    expected = ours(A, "caption en").images
    for source in (path, str(path), np.asarray(A), [path], (A,), [[str(path)]], [(np.asarray(A),)]):
        np.testing.assert_array_equal(ours(source, "caption en").images, expected)
    columns = ours(deque([A, B]), deque(["a", "b"]))  # as of a data set: sequences, but no lists
    np.testing.assert_array_equal(columns.images, ours([A, B], ["a", "b"]).images)
    mixed = ours([path, [B, np.asarray(C)]], ["a", "b"])
    np.testing.assert_array_equal(mixed.images, ours([[A], [B, C]], ["a", "b"]).images)


def test_inputs_is_a_pytree(ours):
    inputs = ours(A, "caption en", "cat")
    again = jax.jit(lambda inputs: inputs)(inputs)
    assert isinstance(again, Inputs)
    jax.tree.map(np.testing.assert_array_equal, inputs, again)
    np.testing.assert_array_equal(inputs.valid, inputs.prefix | inputs.targets)


ERRORS = {
    "no prompt": ((A, []), "no prompt"),
    "no image, placeholder": ((None, "<image>caption en"), "0 images for [1] <image>"),
    "empty list": (([], "caption en"), "0 images for 1 prompts"),
    "empty list, placeholder": (([[]], "<image>caption en"), "[0] images for [1] <image>"),
    "one listed image, two prompts": (([A], ["a", "b"]), "1 images for 2 prompts"),
    "two images, one prompt": (([A, B], "a"), "2 images for 1 prompts", "list of images"),
    "too few placeholders": (([A, B], "<image>a"), "2 images", "[1]"),
    "too many placeholders": ((A, "<image>a<image>"), "1 images", "[2]"),
    "different nesting": (([[A], [B, C]], ["<image>a<image>", "<image>b"]), "[1, 2]", "[2, 1]"),
    "mixed batch": (([A, B], ["<image>a", "caption en"]), "prompt 1", "every prompt or"),
    "not a str": ((A, 7), "prompt 0", "int"),
    "not a str in a list": (([A, B], ["a", None]), "prompt 1", "NoneType"),
    "suffix count": (([A, B], ["a", "b"], ["cat"]), "1 suffixes", "2 prompts"),
    "suffix not a str": ((A, "a", [3]), "suffix 0", "int"),
    "no suffix": ((A, "a", []), "no suffix"),
    "image in suffix": ((A, "a", "<image>"), "suffix", "<image>"),
    "padding side": ((A, "a", None, "top"), "'top'", "'left' or 'right'"),
    "over the length": (
        (A, "caption en", "cat", "left", 6),
        "prompt 0",
        "length is 6",
        "larger length",
    ),
    "length of zero": ((A, "caption en", None, "left", 0), "length is 0"),
    "over the context": (
        ([A, B], ["a", "cat " * 9000]),
        "prompt 1",
        "4 of them for images",
        "context is 8192",
    ),
    "suffix over the context": ((A, "a", "cat " * 9000), "prompt 0", "context is 8192"),
    "context before length": ((A, "cat " * 9000, None, "left", 99999), "context is 8192"),
    "not an image": ((7, "a"), "int"),
    "no file": (("absent.png", "a"), "absent.png"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_inputs_are_refused(case, ours):
    arguments, *parts = ERRORS[case]
    with pytest.raises(ValueError) as error:
        ours(*arguments)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300 and all(part in text for part in parts), text


def test_transformers_refuses_them_too(theirs):
    """The exception is a mixed batch, where transformers writes bos into a word."""
    for images, prompts in [
        (None, "a"),
        (A, ["a", "b"]),
        ([A, B], "a"),
        ([A, B], "<image>a"),
        (A, "<image>a<image>"),
    ]:
        with pytest.raises(ValueError):
            theirs(images=images, text=prompts)
    mixed = theirs(images=[A], text=["<image>a", "caption en"], padding=True)["input_ids"][1]
    assert theirs.decode(mixed, skip_special_tokens=False).endswith("captio<bos>n en\n")


def test_one_image_is_for_all_prompts(ours):
    together, apart = ours(A, ["a", "cat"]), ours([A, A], ["a", "cat"])
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    marked = ours(A, ["<image>a", "<image>cat"])
    jax.tree.map(np.testing.assert_array_equal, marked, apart)


def test_text_alone_is_a_row_without_image_tokens(ours):
    text, with_image = ours(None, "caption en", "cat"), ours(A, "caption en", "cat")
    assert text.images is None
    is_text = with_image.tokens[0] != ours.tokenizer.image_id
    np.testing.assert_array_equal(text.tokens[0], with_image.tokens[0, is_text])
    mixed = ours([None, A, []], ["caption en"] * 3)
    assert len(mixed.images) == 1
    np.testing.assert_array_equal(mixed.valid.sum(axis=1), [4, 8, 4])
