"""Text <-> ids: Gemma's sentencepiece model with `<image>`, `<locNNNN>` and `<segNNN>`, as transformers configures it for PaliGemma."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import count, groupby
from pathlib import Path

import sentencepiece

IMAGE = "<image>"
LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]
# Ordinary pieces to sentencepiece, special to transformers (GemmaTokenizer, GemmaConverter), which leaves them out of decoded text.
SPECIAL = {IMAGE, "<mask>", "<start_of_turn>", "<end_of_turn>"}
BYTE = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """A sentencepiece `tokenizer.model` plus the tokens that transformers adds to it.

    Both kinds of file work: the released PaliGemma one, which has the `<loc>` and `<seg>` pieces inside, and Gemma's own without them.
    A token that is not inside gets the id stated by the directory's `added_tokens.json`, or by `added_tokens_decoder` in its
    `tokenizer_config.json`; failing that the next free one, in the order loc, seg, image. The released ids (loc0000 256000, seg000 257024,
    image 257152) come out either way.

    Args:
      model_file: path of the sentencepiece model.
      image_token_id: `image_token_index` of config.json, to be compared with what the files here say.

    Attributes:
      bos_id, eos_id, pad_id, image_id: int.
      vocab_size: one more than the highest id; the model's embedding may have further, never trained rows.

    Raises:
      ValueError: the file is missing or not a sentencepiece model, lacks bos, eos or pad, two tokens share an id, or `image_token_id` differs.
    """

    def __init__(self, model_file: str | Path, image_token_id: int | None = None):
        path = Path(model_file)
        self._model, pieces = _load(path)
        model = self._model
        self._ids = _ids(pieces, path)
        self._pieces = {i: token for token, i in self._ids.items()}
        hidden = {token for i, token in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)}  # sentencepiece never finds them in a text
        literals = sorted(hidden | (self._ids.keys() - set(pieces)), key=len, reverse=True)  # the longest match wins, as in transformers
        self._literal = re.compile("(" + "|".join(map(re.escape, literals)) + ")")
        self._silent = {self._ids[token] for token in hidden | SPECIAL if token in self._ids}
        self.bos_id, self.eos_id, self.pad_id = model.bos_id(), model.eos_id(), model.pad_id()
        self.image_id = self._ids[IMAGE]
        self.vocab_size = max(self._pieces) + 1
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise ValueError(f"{path} has no bos, eos or pad piece, so it is not a Gemma tokenizer: take the tokenizer.model of the checkpoint")
        if image_token_id is not None and image_token_id != self.image_id:
            raise ValueError(
                f"{IMAGE} has id {self.image_id} by {path} but {image_token_id} by config.json (image_token_index): "
                f"take both from one checkpoint, or state the id in {path.parent / 'added_tokens.json'}"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it is: nothing is stripped or normalised, no bos or eos is added, and a literal `<bos>`, `<image>`, ... is one id.

        Equal to transformers', except in runs of spaces that are longer than the longest space piece, or that have a literal U+2581 among
        them: those are cut greedily here, as sentencepiece does, and there as the order of the merges in tokenizer.json has it.
        Raises ValueError for a text that is not Unicode (lone surrogates, as undecodable bytes of a command line make them).
        """
        if bad := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"character {bad.start()} of the text is a lone surrogate, {bad[0]!r}: decode the text as UTF-8")
        parts = self._literal.split(text)  # text, literal, text, ..., text
        return [i for n, part in enumerate(parts) for i in ([self._ids[part]] if n % 2 else self._model.encode(part))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, as transformers' `decode(ids, skip_special_tokens=True)`: `<loc>` and `<seg>` stay; `<image>`, bos, eos, pad go.

        Bytes that do not form UTF-8 become one U+FFFD each. Ids beyond the vocabulary (the embedding's spare rows) have no text.
        Raises ValueError for a negative id, which labels have but texts do not.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"id {min(ids)} is no token: pass generated or encoded ids, not labels")
        pieces = [self._pieces[i] for i in ids if i in self._pieces and i not in self._silent]
        runs = groupby(pieces, lambda piece: BYTE.fullmatch(piece) is not None)
        return "".join(_bytes_to_text(run) if is_byte else "".join(run).replace("▁", " ") for is_byte, run in runs)

    def settled(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` have a text that no later id can change: all but a run of byte pieces at the end."""
        count = len(ids)
        while count and BYTE.fullmatch(self._pieces.get(int(ids[count - 1]), "")):
            count -= 1
        return count

    def loc(self, n: int) -> int:
        """Id of `<locNNNN>`, n in [0, 1023]."""
        return self._ids[LOCATIONS[_within(n, LOCATIONS)]]

    def seg(self, n: int) -> int:
        """Id of `<segNNN>`, n in [0, 127]."""
        return self._ids[SEGMENTS[_within(n, SEGMENTS)]]


def _load(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, list[str]]:
    """The model of a file, and its pieces in the order of their ids."""
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: a checkpoint directory needs the tokenizer.model of the checkpoint that it comes from")
    try:
        proto = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    model = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(proto) and model.load_from_serialized_proto(proto)
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())] if loaded else []
    except (RuntimeError, UnicodeDecodeError):
        pieces = []
    if not pieces:
        raise ValueError(f"{path} ({len(proto)} bytes) is not a sentencepiece model: download it again (a Git LFS pointer looks like this too)")
    return model, pieces


def _ids(pieces: list[str], path: Path) -> dict[str, int]:
    """token -> id: the pieces of the model, then what the files beside it state, then the next free ids."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    ids = _stated(path.parent) | ids
    free = count(max(ids.values()) + 1)
    for token in (*LOCATIONS, *SEGMENTS, IMAGE):
        if token not in ids:
            ids[token] = next(free)
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"two tokens share an id: added_tokens.json or tokenizer_config.json in {path.parent} does not belong to {path.name}")
    return ids


def _stated(directory: Path) -> dict[str, int]:
    """token -> id as a Hugging Face directory states it in added_tokens.json or in the older tokenizer_config.json; {} if it does not."""
    try:
        if (file := directory / "added_tokens.json").is_file():
            return {token: int(i) for token, i in json.loads(file.read_text("utf-8")).items()}
        if (file := directory / "tokenizer_config.json").is_file():
            stated = json.loads(file.read_text("utf-8")).get("added_tokens_decoder", {})
            return {token["content"]: int(i) for i, token in stated.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} does not say which added token has which id ({error!r}): download it again or remove it") from error
    return {}


def _bytes_to_text(pieces: Iterable[str]) -> str:
    data = bytes(int(piece[3:5], 16) for piece in pieces)
    try:
        return data.decode()
    except UnicodeDecodeError:  # as the ByteFallback decoder of the tokenizers library: all of the run or nothing
        return "�" * len(data)


def _within(n: int, tokens: list[str]) -> int:
    if not 0 <= n < len(tokens):
        raise ValueError(f"{n} is outside {tokens[0]} ... {tokens[-1]}: pass 0 to {len(tokens) - 1}")
    return n
