"""Added tokens, as releases 4 and 5 of transformers write them: ids and texts equal those of
transformers on the same directory."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image
from support.hf_processor import save_processor, train_tokenizer
from transformers import AddedToken, AutoProcessor

from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

FILES = ["tokenizer.json", "tokenizer.model"]
NEW = [
    AddedToken("<cell>", special=True),
    AddedToken("zebra"),
    AddedToken("New York"),
    AddedToken("Los Angeles", normalized=False),
    AddedToken("<left>", lstrip=True, special=True),
    AddedToken("<right>", rstrip=True),
    AddedToken("word", single_word=True),
    AddedToken("é", single_word=True, normalized=False),
    AddedToken("person", special=True),  # a piece
]
PARTS = [token.content for token in NEW] + [
    *["zebras", "words", "sword", "New  York", "New▁York", "Los▁Angeles", "\n", " ", "  ", "x"],
    *["<bos>", "<image>", "<mask>", "<loc0003>", "<seg001>", "a dog", "日本", "<ro", "w>"],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory as release 5 saves it, with the tokenizer.model that it starts from."""
    directory = tmp_path_factory.mktemp("saved")
    train_tokenizer(directory / "tokenizer.model", spaces=True, vocabulary=400)
    save_processor(directory, 28, 14)
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.add_tokens(NEW)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def keep_only(directory, name):
    for other in FILES:
        if other != name:
            (directory / other).unlink()


def as_release_4(directory):
    """Move the added tokens from tokenizer.json to the files that releases 4 write."""
    file = directory / "tokenizer.json"
    listed = {entry.pop("id"): entry for entry in json.loads(file.read_text())["added_tokens"]}
    config = directory / "tokenizer_config.json"
    edit(config, added_tokens_decoder=listed, additional_special_tokens=["<image>"])
    edit(config, extra_special_tokens={})
    edit(directory / "added_tokens.json", **{listed[i]["content"]: i for i in listed if i >= 400})
    edit(directory / "special_tokens_map.json", bos_token=listed[2])


def as_slow_release_4(directory):
    """Saved by a tokenizer of sentencepiece, which lists no pieces that are never split."""
    as_release_4(directory)
    keep_only(directory, "tokenizer.model")
    config = directory / "tokenizer_config.json"
    listed = json.loads(config.read_text())["added_tokens_decoder"]
    kept = {i: token for i, token in listed.items() if int(i) < 5 or int(i) >= 400}
    edit(config, added_tokens_decoder=kept)


def as_release_5_over_4(directory):
    """Files of release 4 that a later save by release 5 leaves behind."""
    edit(directory / "added_tokens.json", **{"<image>": 1552})
    edit(directory / "special_tokens_map.json", bos_token="<bos>", pad_token={"content": "<pad>"})


def without_files(directory):
    """Before release 4.34: ids only, and the names of the special tokens."""
    first, second, third = Tokenizer(directory).encode("<image><cell>zebra")
    keep_only(directory, "tokenizer.model")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    edit(directory / "added_tokens.json", **{"<image>": first, "<cell>": second, "zebra": third})
    edit(directory / "special_tokens_map.json", mask_token="<cell>")


DIRECTORIES = {
    "release 5": lambda directory: keep_only(directory, "tokenizer.json"),
    "release 5, with tokenizer.model": lambda directory: None,
    "release 5 over release 4": as_release_5_over_4,
    "release 4": as_release_4,
    "release 4, tokenizer.model": lambda d: (as_release_4(d), keep_only(d, "tokenizer.model")),
    "release 4, slow": as_slow_release_4,
    "added_tokens.json": without_files,
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_ids_and_texts_equal_those_of_transformers(copy, case):
    DIRECTORIES[case](copy)
    ours, theirs = Tokenizer(copy), AutoProcessor.from_pretrained(copy).tokenizer
    assert ours.vocab_size == len(theirs) == 1553 + (2 if case == "added_tokens.json" else 8)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(PARTS, k=rng.randint(0, 8)))
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        ids += rng.choices(range(1540, 1565), k=5)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


def test_files_that_disagree_are_named(copy):
    """The one that transformers uses is used."""
    other = train_tokenizer(copy.parent / "tokenizer.model", vocabulary=401)
    shutil.copy(other, copy)
    with pytest.warns(UserWarning, match=r"tokenizer\.model gives .* tokenizer\.json is used"):
        ours = Tokenizer(copy)
    assert ours.encode("<cell>") == [1553]
    as_release_4(copy)
    keep_only(copy, "tokenizer.json")
    config = copy / "tokenizer_config.json"
    listed = json.loads(config.read_text())["added_tokens_decoder"]
    edit(config, added_tokens_decoder=dict(list(listed.items())[:-1]))
    with pytest.warns(UserWarning, match=r"gives 'é' .* tokenizer_config\.json is used"):
        ours = Tokenizer(copy)
    theirs = AutoProcessor.from_pretrained(copy).tokenizer
    for text in ("<cell>é", NEW[-2].content):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_special_added_tokens_are_not_part_of_the_text(copy):
    ours = Tokenizer(copy)
    assert len(ours.encode("<cell>zebra")) == 2
    assert ours.decode(ours.encode("a<cell>zebra<left>s")) == "azebras"


def test_inputs_equal_those_of_transformers(copy):
    """Flags act across the bos that the processor inserts, and at the end of a suffix."""
    edit(copy / "tokenizer.json", **rstrip_bos_lstrip_eos(copy))
    ours, theirs = Processor(Tokenizer(copy), 28, 4), AutoProcessor.from_pretrained(copy)
    image = Image.fromarray(np.zeros((28, 28, 3), np.uint8))
    for prompt, suffix in [("  zebra <left> x", "word  "), ("word", ""), ("é", "<cell> New York")]:
        inputs, expected = ours(image, prompt, suffix), theirs(image, prompt, suffix=suffix)
        np.testing.assert_array_equal(inputs.tokens, expected["input_ids"])


def rstrip_bos_lstrip_eos(directory):
    listed = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    for entry in listed:
        entry["rstrip"] |= entry["content"] == "<bos>"
        entry["lstrip"] |= entry["content"] == "<eos>"
    return {"added_tokens": listed}
