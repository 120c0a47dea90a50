"""Read what defines a tokenizer: its pieces, merges and added tokens, as transformers 5.23 does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from convert.typed_json import JsonObject, TokenId, describe, load_json
from paligemma_jax.processing.added_tokens import (
    AddedTokens,
    NumberedToken,
    Token,
    read_added_tokens,
)
from paligemma_jax.processing.sentencepiece_model import (
    CONTROL,
    USER_DEFINED,
    generate_merges,
    read_pieces,
)

JSON, MODEL = "tokenizer.json", "tokenizer.model"
JSON_LIMIT = 2**27  # bytes; Gemma's has 34 MB
MAX_ADDED = 2**14  # tokenizers compares each with all before; PaliGemma has 1,400

# Gemma's values of the fields that change ids and texts. transformers assumes them.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT = {  # never matches: the normalizer leaves no space
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
DECODER = {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]}
PIPELINE = {"normalizer": [NORMALIZER], "pre_tokenizer": [None, SPLIT], "decoder": [DECODER]}


class _Model(Struct):
    vocab: dict[str, TokenId]
    merges: list[tuple[str, str] | str]  # "a b" until release 0.19 of tokenizers
    type: Literal["BPE"] = "BPE"


class _TokenizerJson(Struct):
    model: _Model
    added_tokens: list[NumberedToken] = []
    normalizer: JsonObject | None = None
    pre_tokenizer: JsonObject | None = None
    decoder: JsonObject | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What defines a tokenizer of Gemma's kind."""

    file: Path  # tokenizer.json or tokenizer.model
    pieces: dict[str, int]  # piece -> id, from 0 to len(pieces) - 1
    merges: list[tuple[str, str]]  # best first
    added: AddedTokens


def find_tokenizer(path: Path) -> Path:
    """Return the tokenizer.json of a directory, or else its tokenizer.model.

    Raises:
        ValueError: There is neither, or `path` is not a file or directory.
    """
    files = [path / JSON, path / MODEL] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(
        f"no tokenizer at {path}: copy tokenizer.json or tokenizer.model of the original "
        "checkpoint there"
    )


def read_vocabulary(file: Path) -> Vocabulary:
    """Read tokenizer.json or tokenizer.model, and the files beside it.

    Warns about ids in files that transformers does not use.

    Raises:
        ValueError: A file cannot be used.
    """
    vocabulary = _read_json(file) if file.suffix == ".json" else _read_model(file)
    added = vocabulary.added
    if len(added.tokens) > MAX_ADDED:
        count = len(added.tokens)
        raise ValueError(f"{file.parent} must add at most {MAX_ADDED} tokens, got {count}")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if added.names.get(name) not in vocabulary.pieces:
            raise ValueError(
                f"{file} has no {name} {added.names.get(name, '')}, so it is not a Gemma "
                f"tokenizer: use the {file.name} of the checkpoint"
            )
    return vocabulary


def _read_json(file: Path) -> Vocabulary:
    content = load_json(file, _TokenizerJson, JSON_LIMIT)
    for field, allowed in PIPELINE.items():
        value = getattr(content, field)
        if value not in allowed:
            expected = msgspec.json.encode(allowed[0]).decode()
            raise ValueError(f"{file}: {field} must be {expected}, got {describe(value)}")
    pieces = content.model.vocab
    if set(pieces.values()) != set(range(len(pieces))):
        raise ValueError(f"{file}: model.vocab must have the ids 0, 1, ... {len(pieces) - 1}")
    merges = [_halves(merge) for merge in content.model.merges]
    for left, right in merges:  # else tokenizers panics
        if not (left in pieces and right in pieces and left + right in pieces):
            raise ValueError(f"{file}: model.merges has {[left, right]}, not in model.vocab")
    added = read_added_tokens(file, content.added_tokens)
    vocabulary = Vocabulary(file, pieces, merges, added)
    listed = {token.content: token.id for token in content.added_tokens}
    _warn_if_different(vocabulary, added.file, file, listed)
    model = file.with_name(MODEL)
    if model.is_file():
        try:
            ids = {piece: i for i, piece in enumerate(read_pieces(model))}
        except ValueError as error:
            warnings.warn(f"{error}; {file.name} is used", stacklevel=2)
        else:
            _warn_if_different(vocabulary, file, model, ids)
    return vocabulary


def _read_model(file: Path) -> Vocabulary:
    types = read_pieces(file)
    never_split = [
        Token(content=piece, normalized=False, special=kind == CONTROL)
        for piece, kind in types.items()
        if kind in (CONTROL, USER_DEFINED)
    ]
    pieces = {piece: i for i, piece in enumerate(types)}
    added = read_added_tokens(file, pieces=never_split)
    return Vocabulary(file, pieces, generate_merges(pieces), added)


def _halves(merge: tuple[str, str] | str) -> tuple[str, str]:
    if isinstance(merge, str):
        left, _, right = merge.partition(" ")
        return left, right
    return merge


def _warn_if_different(
    vocabulary: Vocabulary, used: Path, other: Path, ids: Mapping[str, int]
) -> None:
    ours = vocabulary.pieces | vocabulary.added.ids
    if "\t" in ours:
        ours.setdefault("<0x09>", ours["\t"])  # which transformers puts in its place for Gemma
    token = next((token for token, i in ids.items() if ours.get(token) != i), None)
    if token is not None:
        warnings.warn(
            f"{other} gives {token!r} the id {ids[token]}, and {used.name} "
            f"{ours.get(token, 'none')}: {used.name} is used, as in transformers",
            stacklevel=2,
        )
