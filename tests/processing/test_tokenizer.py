"""The tokenizer against transformers' GemmaTokenizer, token for token, and its errors."""

import json
import random
import re
import shutil

import pytest
from support.hf_processor import ADDED, hf_processor, save_processor, train_tokenizer
from transformers import AutoProcessor

from paligemma_jax.processing.tokenizer import Tokenizer

KINDS = {"inside": {"added": True}, "outside": {"added": False}, "spaces": {"added": True, "spaces": True}}
BITS = [
    "cat", " dog", "detect", "<", "12345", "A.B,c", "\n", "\n\n", "\n" * 7, "\r\n", "\t", "\t\t", "\0", " ", "  ", "   ", "▁", "▁▁",
    "😀", "👩‍👩‍👧", "日本語", "é", "e\u0301", "ﬁ", "\u00a0", "\u3000", "\ufeff", "١٢",
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<image>", "<loc0003>", "<loc1023>", "<seg127>",
    "<loc1024>", "<seg128>", "<loc12>", "loc0003>", "<0x41>", "<<bos>>", "<bo", "s>",
]  # fmt: skip


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
    return (hf_processor(directory, 28, 14) if request.param == "tokenizer.model" else AutoProcessor.from_pretrained(directory)).tokenizer


def test_ids(ours, theirs):
    for token in [*ADDED, "<image>", "<bos>", "\n"]:
        assert ours.encode(token) == [theirs.convert_tokens_to_ids(token)]
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    assert (ours.loc(7), ours.seg(9), ours.image_id) == tuple(theirs.convert_tokens_to_ids(["<loc0007>", "<seg009>", "<image>"]))
    assert ours.image_id == ours.seg(127) + 1 == ours.loc(1023) + 129 == ours.vocab_size - 1 == len(theirs) - 1


def test_encode_equals_transformers(ours, theirs):
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(BITS, k=rng.randint(0, 8)))
        if not re.search("▁ | ▁| {8}", text):  # see test_long_runs_of_spaces
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_decode_equals_transformers(ours, theirs):
    rng = random.Random(0)
    for _ in range(2000):  # half of the ids are bytes, mostly not UTF-8; some lie beyond the vocabulary
        ids = [rng.choice([rng.randrange(ours.vocab_size + 20), rng.randrange(10, 270)]) for _ in range(rng.randint(0, 9))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


def test_decode_returns_what_was_encoded(ours):
    text = "segment  cat\n\n\n\t<loc0003><seg001> 😀 日本語"
    assert ours.decode(ours.encode(f"<image><bos>{text}<eos><pad>")) == text
    assert ours.decode(iter([])) == ""


def test_long_runs_of_spaces(tmp_path):
    """The one known difference: runs longer than the longest space piece (7 here) are cut greedily; transformers' merges cut elsewhere."""
    train_tokenizer(tmp_path / "tokenizer.model", spaces=True)
    ours, theirs = Tokenizer(tmp_path / "tokenizer.model"), hf_processor(tmp_path, 28, 14).tokenizer
    for n in range(1, 8):
        assert ours.encode("a" + " " * n + "cat") == theirs.encode("a" + " " * n + "cat", add_special_tokens=False)
    assert ours.encode(" " * 8) != theirs.encode(" " * 8, add_special_tokens=False)
    assert ours.decode(ours.encode(" " * 40)) == " " * 40


def released_like(directory, file, content):
    train_tokenizer(directory / "tokenizer.model", added=False, vocabulary=400)
    (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory / "tokenizer.model"


def test_stated_ids_are_honoured(tmp_path):
    path = released_like(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"2000": {"content": "<image>"}, "1": {"content": "<eos>"}}})
    assert Tokenizer(path, image_token_id=2000).encode("<eos><image>") == [1, 2000]
    stated = {"<image>": 400, "<m": 2999, "<mine>": 3000} | {token: 401 + i for i, token in enumerate(ADDED)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(stated))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("<image><loc0000><seg127><mine>") == [400, 401, 1552, 3000]
    assert tokenizer.vocab_size == 3001


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_other_image_token(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.model", vocabulary=400)
    with pytest.raises(ValueError) as error:
        Tokenizer(path, image_token_id=257152)
    assert all(part in one_line(error) for part in ("1552", "257152", "added_tokens.json"))
    assert Tokenizer(path, image_token_id=1552).image_id == 1552


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\nsize 4241003\n", b"\x00" * 99, "half", "no bos"])
def test_not_a_tokenizer(tmp_path, content):
    path = train_tokenizer(tmp_path / "tokenizer.model", vocabulary=400)
    if content == "no bos":
        content = path.read_bytes().replace(b"<bos>", b"<xos>", 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert "tokenizer.model" in one_line(error)


@pytest.mark.parametrize("content", ["{", "[1]", '{"<image>": "x"}', '{"<image>": 5}'])
def test_bad_added_tokens(tmp_path, content):
    with pytest.raises(ValueError) as error:
        Tokenizer(released_like(tmp_path, "added_tokens.json", content))
    assert "added_tokens.json" in one_line(error)


def test_no_tokenizer(tmp_path):
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(ValueError, match="no tokenizer at"):
            Tokenizer(path)


def test_outside(ours):
    for call in (lambda: ours.loc(1024), lambda: ours.seg(-1), lambda: ours.decode([5, -100]), lambda: ours.encode("\ud800")):
        with pytest.raises(ValueError) as error:
            call()
        one_line(error)


def test_moved_directory_loads_offline(directory, tmp_path):
    """What save_processor writes states no path, and transformers needs nothing else."""
    moved = shutil.copytree(directory, tmp_path / "moved")
    (moved / "tokenizer.model").unlink()
    assert str(directory) not in (moved / "tokenizer_config.json").read_text()
    assert AutoProcessor.from_pretrained(moved).tokenizer.encode("<loc0003>cat") == Tokenizer(directory / "tokenizer.model").encode("<loc0003>cat")
