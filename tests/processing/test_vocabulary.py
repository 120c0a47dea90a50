"""Files of a tokenizer that cannot be used are refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
from support.hf_processor import save_processor, train_tokenizer

from paligemma_jax.processing.tokenizer import Tokenizer

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\nsize 4241003\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    train_tokenizer(directory / "tokenizer.model", vocabulary=400)
    return save_processor(directory, 28, 14)


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_a_directory_without_a_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "none"):
        message = refused(path)
        assert all(part in message for part in ("no tokenizer at", "tokenizer.json", ".model"))


@pytest.mark.parametrize("content", [b"", LFS_POINTER, b"\x00" * 99, "half", "no bos", "unigram"])
def test_a_file_that_is_not_a_model_like_gemmas(directory, content):
    path = directory / "tokenizer.model"
    complete = path.read_bytes()
    damaged = {
        "half": complete[: len(complete) // 2],
        "no bos": complete.replace(b"<bos>", b"<xos>", 1),
        "unigram": complete + b"\x12\x02\x18\x01",  # a second trainer_spec overrides model_type
    }
    path.write_bytes(damaged.get(content) or content)
    assert "tokenizer.model" in refused(path)
    with pytest.warns(UserWarning, match=r"tokenizer\.json is used"):
        Tokenizer(directory)


def change(*path, to):
    """Replace a value of tokenizer.json."""

    def edit(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return edit


CASES = {
    "gap": (change("added_tokens", -1, "id", to=1600), "'<image>' the id 1600", "1552"),
    "twice": (change("added_tokens", -1, "content", to="<seg127>"), "'<seg127>' the id 1552"),
    "negative": (change("added_tokens", -1, "id", to=-1), "added_tokens", "at least 0", "-1"),
    "no content": (change("added_tokens", -1, "content", to=None), "content must be a string"),
    "surrogate": (change("added_tokens", -1, "content", to="\ud800"), "not readable JSON"),
    "hole": (change("model", "vocab", "zz", to=9999), "model.vocab must have the ids"),
    "shared id": (change("model", "vocab", "zz", to=5), "model.vocab must have the ids"),
    "string": (change("model", "vocab", "zz", to="5"), "model.vocab", "must be an integer"),
    "merges": (change("model", "merges", 0, to=["<", "@"]), "['<', '@'], not in model.vocab"),
    "one half": (change("model", "merges", 0, to=["<"]), "merges", "length 2"),
    "no space": (change("model", "merges", 0, to="ab"), "['ab', ''], not in model.vocab"),
    "unigram": (change("model", "type", to="Unigram"), "model.type", "'Unigram'"),
    "normalizer": (change("normalizer", to={"type": "NFKC"}), 'normalizer must be {"type":"Rep'),
    "lowercase": (change("pre_tokenizer", to={"type": "Digits"}), "pre_tokenizer must be null"),
    "decoder": (change("decoder", to={"type": "ByteLevel"}), "decoder must be {"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_json_unlike_gemmas(directory, case):
    edit, *parts = CASES[case]
    (directory / "tokenizer.model").unlink()
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    message = refused(directory)
    assert all(part in message for part in ["tokenizer.json", *parts]), message


@pytest.mark.parametrize("content", [b"", LFS_POINTER, b"half", b"\xff", b"[" * 10**5])
def test_a_damaged_tokenizer_json(directory, content):
    file = directory / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:9999] if content == b"half" else content)
    message = refused(directory)
    assert "tokenizer.json: not readable JSON" in message or "got an array" in message
