"""Text to ids and back: Gemma's sentencepiece model with `<image>`, `<locNNNN>` and `<segNNN>`, as
transformers configures it for PaliGemma."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import count, groupby
from pathlib import Path

import sentencepiece

IMAGE = "<image>"
LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]
# Ordinary pieces of the sentencepiece model that transformers omits from decoded text
# (GemmaTokenizer, GemmaConverter).
SPECIAL = {IMAGE, "<mask>", "<start_of_turn>", "<end_of_turn>"}
BYTE = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """A sentencepiece `tokenizer.model` plus the tokens that transformers adds to it.

    Works with the released PaliGemma file, which contains the `<loc>` and `<seg>` pieces, and with
    Gemma's own, which does not. A missing token gets its id from the directory's
    `added_tokens.json`, or from `added_tokens_decoder` in its `tokenizer_config.json`, or else the
    next free one, in the order loc, seg, image. Either way the ids are the released ones (loc0000
    256000, seg000 257024, image 257152).

    Args:
        model_file: Path of the sentencepiece model.
        image_token_id: `image_token_index` of config.json, compared with the tokenizer's own.

    Attributes:
        bos_id, eos_id, pad_id, image_id: Token ids.
        vocab_size: The highest id plus 1. The model's embedding may have more rows, never trained.

    Raises:
        ValueError: The file is missing or not a sentencepiece model, has no bos, eos or pad, two
            tokens share an id, or `image_token_id` differs.
    """

    def __init__(self, model_file: str | Path, image_token_id: int | None = None):
        path = Path(model_file)
        self._model, pieces = _load(path)
        self._ids = _token_ids(pieces, path)
        self._pieces = {i: token for token, i in self._ids.items()}
        model = self._model
        # Sentencepiece never produces these from text, so they are split off first.
        hidden = {
            token for i, token in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)
        }
        literals = hidden | (self._ids.keys() - set(pieces))
        longest_first = sorted(literals, key=len, reverse=True)  # as transformers matches
        self._literal = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._silent = {self._ids[token] for token in hidden | SPECIAL if token in self._ids}
        self.bos_id, self.eos_id, self.pad_id = model.bos_id(), model.eos_id(), model.pad_id()
        self.image_id = self._ids[IMAGE]
        self.vocab_size = max(self._pieces) + 1
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise ValueError(
                f"{path} has no bos, eos or pad piece, so it is not a Gemma tokenizer: "
                "use the tokenizer.model of the checkpoint"
            )
        if image_token_id is not None and image_token_id != self.image_id:
            raise ValueError(
                f"the id of {IMAGE} is {self.image_id} in {path}, but {image_token_id} in "
                "config.json (image_token_index): use files of one checkpoint, or set the id in "
                f"{path.parent / 'added_tokens.json'}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, which is not stripped or normalized; bos and eos are not added.

        A literal `<bos>`, `<image>`, ... is one id. Equal to transformers, except in runs of spaces
        that are longer than the longest space piece or contain a literal U+2581: sentencepiece
        splits them greedily, transformers by the order of the merges in tokenizer.json.

        Raises:
            ValueError: The text is not valid Unicode (lone surrogates, such as undecodable bytes of
                a command line).
        """
        surrogate = re.search("[\ud800-\udfff]", text)
        if surrogate:
            raise ValueError(
                f"character {surrogate.start()} of the text is a lone surrogate, "
                f"{surrogate[0]!r}: decode the text as UTF-8"
            )
        ids: list[int] = []
        for n, part in enumerate(self._literal.split(text)):  # text, literal, text, ..., text
            ids += [self._ids[part]] if n % 2 else self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, as transformers' `decode(ids, skip_special_tokens=True)`.

        `<loc>` and `<seg>` stay; `<image>`, bos, eos and pad are omitted. A run of bytes that is
        not valid UTF-8 becomes one U+FFFD per byte. Ids beyond the vocabulary (unused rows of the
        embedding) have no text.

        Raises:
            ValueError: An id is negative, as in labels.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"ids must not be negative, got {min(ids)}: labels are not text")
        pieces = [self._pieces[i] for i in ids if i in self._pieces and i not in self._silent]
        runs = groupby(pieces, lambda piece: BYTE.fullmatch(piece) is not None)
        return "".join(
            _bytes_to_text(run) if is_byte else "".join(run).replace("▁", " ")
            for is_byte, run in runs
        )

    def stable_length(self, ids: Sequence[int]) -> int:
        """How many of the first ids have a text that later ids cannot change.

        That is all but a run of byte pieces at the end.
        """
        length = len(ids)
        while length and BYTE.fullmatch(self._pieces.get(int(ids[length - 1]), "")):
            length -= 1
        return length

    def loc(self, n: int) -> int:
        """Id of `<locNNNN>`, for n from 0 to 1023."""
        return self._ids[_at(LOCATIONS, n)]

    def seg(self, n: int) -> int:
        """Id of `<segNNN>`, for n from 0 to 127."""
        return self._ids[_at(SEGMENTS, n)]


def _load(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, list[str]]:
    """The model of a file, and its pieces in order of their ids."""
    if not path.is_file():
        raise ValueError(
            f"no tokenizer at {path}: copy the tokenizer.model of the original checkpoint there"
        )
    try:
        proto = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    model, pieces = sentencepiece.SentencePieceProcessor(), []
    try:
        if proto and model.load_from_serialized_proto(proto):
            pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    except (RuntimeError, UnicodeDecodeError):
        pieces = []
    if not pieces:
        raise ValueError(
            f"{path} ({len(proto)} bytes) is not a sentencepiece model: download it again "
            "(it may be a Git LFS pointer)"
        )
    return model, pieces


def _token_ids(pieces: list[str], path: Path) -> dict[str, int]:
    """Token -> id: pieces of the model, then those of the files beside it, then free ids."""
    ids = _added_tokens(path.parent) | {piece: i for i, piece in enumerate(pieces)}
    free = count(max(ids.values()) + 1)
    for token in (*LOCATIONS, *SEGMENTS, IMAGE):
        if token not in ids:
            ids[token] = next(free)
    if len(set(ids.values())) != len(ids):
        raise ValueError(
            "two tokens share an id: added_tokens.json or tokenizer_config.json in "
            f"{path.parent} does not belong to {path.name}"
        )
    return ids


def _added_tokens(directory: Path) -> dict[str, int]:
    """Token -> id from added_tokens.json, or from the older tokenizer_config.json, if present."""
    file, config = directory / "added_tokens.json", directory / "tokenizer_config.json"
    try:
        if file.is_file():
            return {token: int(i) for token, i in json.loads(file.read_text("utf-8")).items()}
        if config.is_file():
            file = config
            added = json.loads(file.read_text("utf-8")).get("added_tokens_decoder", {})
            return {token["content"]: int(i) for i, token in added.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} does not map added tokens to ids ({error!r}): download it again or remove it"
        ) from error
    return {}


def _bytes_to_text(pieces: Iterable[str]) -> str:
    data = bytes(int(piece[3:5], 16) for piece in pieces)
    try:
        return data.decode()
    except UnicodeDecodeError:  # all or nothing, as in the ByteFallback decoder of tokenizers
        return "\ufffd" * len(data)


def _at(tokens: list[str], n: int) -> str:
    if not 0 <= n < len(tokens):
        raise ValueError(f"n must be from 0 to {len(tokens) - 1} ({tokens[-1]}), got {n}")
    return tokens[n]
