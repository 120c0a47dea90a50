"""The tokenizer against transformers' GemmaTokenizer, token by token, and its errors."""

from __future__ import annotations

import json
import random
import re
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
    directory = tmp_path_factory.mktemp(request.param)
    train_tokenizer(directory / "tokenizer.model", **KINDS[request.param])
    return save_processor(directory, 28, 14)


@pytest.fixture(scope="module")
def ours(directory):
    return Tokenizer(directory / "tokenizer.model")


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def theirs(request, directory):
    if request.param == "tokenizer.model":
        return hf_processor(directory, 28, 14).tokenizer
    return AutoProcessor.from_pretrained(directory).tokenizer


def test_ids_of_special_tokens_equal_those_of_transformers(ours, theirs):
    for token in [*ADDED, "<image>", "<bos>", "\n"]:
        assert ours.encode(token) == [theirs.convert_tokens_to_ids(token)]
    special = theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == special == (0, 1, 2)
    ids = theirs.convert_tokens_to_ids(["<loc0007>", "<seg009>", "<image>"])
    assert [ours.loc(7), ours.seg(9), ours.image_id] == ids
    assert ours.image_id == ours.seg(127) + 1 == ours.loc(1023) + 129
    assert ours.image_id == ours.vocab_size - 1 == len(theirs) - 1


def test_encode_equals_transformers(ours, theirs):
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(PARTS, k=rng.randint(0, 8)))
        if not re.search("▁ | ▁| {8}", text):  # see test_long_runs_of_spaces
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_decode_equals_transformers(ours, theirs):
    rng = random.Random(0)
    for _ in range(
        2000
    ):  # half of the ids are bytes, mostly invalid UTF-8; some exceed the vocabulary
        ids = [
            rng.choice([rng.randrange(ours.vocab_size + 20), rng.randrange(10, 270)])
            for _ in range(rng.randint(0, 9))
        ]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


def test_decode_inverts_encode(ours):
    text = "segment  cat\n\n\n\t<loc0003><seg001> 😀 日本語"
    assert ours.decode(ours.encode(f"<image><bos>{text}<eos><pad>")) == text
    assert ours.decode(iter([])) == ""


def test_long_runs_of_spaces(tmp_path):
    """The one known difference: runs longer than the longest space piece (7 here) are split
    greedily; transformers' merges split them elsewhere."""
    train_tokenizer(tmp_path / "tokenizer.model", spaces=True)
    ours, theirs = Tokenizer(tmp_path / "tokenizer.model"), hf_processor(tmp_path, 28, 14).tokenizer
    for n in range(1, 8):
        text = "a" + " " * n + "cat"
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(" " * 8) != theirs.encode(" " * 8, add_special_tokens=False)
    assert ours.decode(ours.encode(" " * 40)) == " " * 40


def released_like(directory, file, content):
    train_tokenizer(directory / "tokenizer.model", added=False, vocabulary=400)
    (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory / "tokenizer.model"


def test_ids_of_added_tokens_come_from_the_files_beside_the_model(tmp_path):
    added = {"2000": {"content": "<image>"}, "1": {"content": "<eos>"}}
    path = released_like(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    assert Tokenizer(path, image_token_id=2000).encode("<eos><image>") == [1, 2000]
    ids = {"<image>": 400, "<m": 2999, "<mine>": 3000}
    ids |= {token: 401 + i for i, token in enumerate(ADDED)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("<image><loc0000><seg127><mine>") == [400, 401, 1552, 3000]
    assert tokenizer.vocab_size == 3001


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_the_image_token_must_match_the_config(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.model", vocabulary=400)
    with pytest.raises(ValueError) as error:
        Tokenizer(path, image_token_id=257152)
    message = one_line(error)
    assert all(part in message for part in ("1552", "257152", "added_tokens.json"))
    assert Tokenizer(path, image_token_id=1552).image_id == 1552


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\nsize 4241003\n"


@pytest.mark.parametrize("content", [b"", LFS_POINTER, b"\x00" * 99, "half", "no bos"])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, content):
    path = train_tokenizer(tmp_path / "tokenizer.model", vocabulary=400)
    complete = path.read_bytes()
    if content == "half":
        content = complete[: len(complete) // 2]
    if content == "no bos":
        content = complete.replace(b"<bos>", b"<xos>", 1)
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert "tokenizer.model" in one_line(error)


@pytest.mark.parametrize("content", ["{", "[1]", '{"<image>": "x"}', '{"<image>": 5}'])
def test_invalid_added_tokens_are_refused(tmp_path, content):
    with pytest.raises(ValueError) as error:
        Tokenizer(released_like(tmp_path, "added_tokens.json", content))
    assert "added_tokens.json" in one_line(error)


def test_a_missing_tokenizer_is_refused(tmp_path):
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(ValueError, match="no tokenizer at"):
            Tokenizer(path)


def test_values_out_of_range_are_refused(ours):
    for method, value in (
        (ours.loc, 1024),
        (ours.seg, -1),
        (ours.decode, [5, -100]),
        (ours.encode, "\ud800"),
    ):
        with pytest.raises(ValueError) as error:
            method(value)
        one_line(error)


def test_a_moved_directory_loads_offline(directory, tmp_path):
    """The files of save_processor contain no path, and transformers needs no others."""
    ours = Tokenizer(directory / "tokenizer.model")
    moved = shutil.copytree(directory, tmp_path / "moved")
    (moved / "tokenizer.model").unlink()
    assert str(directory) not in (moved / "tokenizer_config.json").read_text()
    theirs = AutoProcessor.from_pretrained(moved).tokenizer
    assert theirs.encode("<loc0003>cat") == ours.encode("<loc0003>cat")
