"""The tokenizer against transformers' GemmaTokenizer, token by token, and its errors."""

from __future__ import annotations

import random
import shutil

import pytest
from support.hf_processor import ADDED, hf_processor, save_processor, train_tokenizer
from transformers import AutoProcessor

from paligemma_jax.processing.tokenizer import Tokenizer

KINDS = {
    "inside": {"added": True},
    "outside": {"added": False},
    "spaces": {"added": True, "spaces": True},
}
PARTS = [
    "cat",
    " dog",
    "detect",
    "<",
    "12345",
    "A.B,c",
    "\n",
    "\n\n",
    "\n" * 7,
    "\r\n",
    "\t",
    "\t\t",
    "\0",
    " ",
    "  ",
    "   ",
    "▁",
    "▁▁",
    "😀",
    "👩‍👩‍👧",
    "日本語",
    "é",
    "e\u0301",
    "ﬁ",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "١٢",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<image>",
    "<loc0003>",
    "<loc1023>",
    "<seg127>",
    "<loc1024>",
    "<seg128>",
    "<loc12>",
    "loc0003>",
    "<0x41>",
    "<<bos>>",
    "<bo",
    "s>",
]


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory):
    """With tokenizer.model and tokenizer.json."""
    directory = tmp_path_factory.mktemp(request.param)
    train_tokenizer(directory / "tokenizer.model", **KINDS[request.param])
    return save_processor(directory, 28, 14)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def pair(request, directory, tmp_path_factory):
    """Our tokenizer and that of transformers, of a directory with only one of the files."""
    alone = tmp_path_factory.mktemp("alone")
    shutil.copy(directory / request.param, alone)
    return Tokenizer(alone), hf_processor(alone, 28, 14).tokenizer


def test_ids_of_special_tokens_equal_those_of_transformers(pair):
    ours, theirs = pair
    for token in [*ADDED, "<image>", "<bos>", "\n"]:
        assert ours.encode(token) == [theirs.convert_tokens_to_ids(token)]
    special = theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == special == (0, 1, 2)
    ids = theirs.convert_tokens_to_ids(["<loc0007>", "<seg009>", "<image>"])
    assert [ours.loc(7), ours.seg(9), ours.image_id] == ids
    assert ours.image_id == ours.seg(127) + 1 == ours.loc(1023) + 129
    assert ours.image_id == ours.vocab_size - 1 == len(theirs) - 1


def test_encode_equals_transformers(pair):
    ours, theirs = pair
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(PARTS, k=rng.randint(0, 8)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_decode_equals_transformers(pair):
    """Half of the ids are bytes, mostly invalid UTF-8; some exceed the vocabulary."""
    ours, theirs = pair
    rng = random.Random(0)
    for _ in range(2000):
        ids = [
            rng.choice([rng.randrange(ours.vocab_size + 20), rng.randrange(10, 270)])
            for _ in range(rng.randint(0, 9))
        ]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


def test_decode_inverts_encode(pair):
    ours, _ = pair
    text = "segment  cat\n\n\n\t<loc0003><seg001> 😀 日本語"
    assert ours.decode(ours.encode(f"<image><bos>{text}<eos><pad>")) == text
    assert ours.decode(iter([])) == ""


def test_text_is_stable_unless_later_ids_can_change_it(pair):
    """Bytes join across special tokens, which are omitted from the text."""
    ours, _ = pair
    first, *others = ours.encode("☃")
    ids = [ours.encode("cat")[0], first, ours.bos_id, ours.vocab_size + 1, *others]
    assert [ours.stable_length(ids[:n]) for n in range(len(ids))] == [0, 1, 1, 1, 1, 1]
    assert ours.decode(ids).endswith("☃")


def test_the_image_token_must_match_the_config(directory):
    image_id = Tokenizer(directory).image_id
    with pytest.raises(ValueError, match=f"{image_id} in .*, but 257152 in config.json"):
        Tokenizer(directory, image_token_id=257152)
    assert Tokenizer(directory, image_token_id=image_id).image_id == image_id


def test_values_out_of_range_are_refused(pair):
    ours, _ = pair
    for method, value in (
        (ours.loc, 1024),
        (ours.seg, -1),
        (ours.decode, [5, -100]),
        (ours.encode, "\ud800"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            method(value)


def test_a_directory_loads_after_a_move(directory, tmp_path):
    """The files of save_processor contain no path, and transformers needs no others."""
    ours = Tokenizer(directory)
    moved = shutil.copytree(directory, tmp_path / "moved")
    (moved / "tokenizer.model").unlink()
    assert str(directory) not in (moved / "tokenizer_config.json").read_text()
    theirs = AutoProcessor.from_pretrained(moved).tokenizer
    assert theirs.encode("<loc0003>cat") == ours.encode("<loc0003>cat")
