"""Text to ids and back: Gemma's tokenizer with `<image>`, `<locNNNN>` and `<segNNN>`, as
transformers configures it for PaliGemma."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from paligemma_jax.processing.added_tokens import IMAGE, Token
from paligemma_jax.processing.vocabulary import Vocabulary, find_tokenizer, read_vocabulary

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]


class Tokenizer:
    """Gemma's tokenizer plus the tokens that a checkpoint and PaliGemma add to it.

    Runs on the `tokenizers` library, as in transformers, whose ids and texts it equals. A directory
    may contain tokenizer.json, which is used if there, or tokenizer.model. Added tokens are those
    of the files beside it. `<loc>`, `<seg>` and `<image>` get the next free ids, in this order, if
    no file names them. Either way their ids are the released ones (loc0000 256000, seg000 257024,
    image 257152).

    Args:
        path: The directory of a checkpoint, or its tokenizer.json or tokenizer.model.
        image_token_id: `image_token_index` of config.json, compared with the tokenizer's own.

    Attributes:
        file: The tokenizer.json or tokenizer.model.
        bos, eos, pad: Tokens, as text.
        bos_id, eos_id, pad_id, image_id: Token ids.
        vocab_size: The highest id plus 1. The model's embedding may have more rows, never trained.

    Raises:
        ValueError: There is no tokenizer, a file cannot be used, the files disagree about ids, or
            `image_token_id` differs.
    """

    def __init__(self, path: str | Path, image_token_id: int | None = None):
        self.file = find_tokenizer(Path(path))
        vocabulary = read_vocabulary(self.file)
        self._engine = engine = _make_engine(vocabulary)
        names = vocabulary.added.names
        self.bos, self.eos, self.pad = (names[f"{name}_token"] for name in ("bos", "eos", "pad"))
        self.bos_id, self.eos_id, self.pad_id = (
            vocabulary.pieces[names[name]] for name in ("bos_token", "eos_token", "pad_token")
        )
        self.vocab_size = engine.get_vocab_size()
        added = engine.get_added_tokens_decoder()
        self._added = {token.content: i for i, token in added.items()}
        self.image_id = self._added[IMAGE]
        silent = [i for i in added if not self.decode([i])]
        byte_ids = [vocabulary.pieces.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._unsettled = {*silent, *byte_ids}
        if image_token_id is not None and image_token_id != self.image_id:
            raise ValueError(
                f"the id of {IMAGE} is {self.image_id} in {self.file}, but {image_token_id} in "
                "config.json (image_token_index): use files of one checkpoint"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, which is not stripped or normalized; bos and eos are not added.

        A literal `<bos>`, `<image>`, ... is one id.

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
        return self._engine.encode(text, add_special_tokens=False).ids

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json of the `tokenizers` library."""
        return self._engine.to_str()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, as transformers' `decode(ids, skip_special_tokens=True)`.

        `<loc>` and `<seg>` stay; `<image>`, bos, eos, pad and other special tokens are omitted. A
        run of bytes that is not valid UTF-8 becomes one U+FFFD per byte. Ids beyond the vocabulary
        (unused rows of the embedding) have no text.

        Raises:
            ValueError: An id is negative, as in labels.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"ids must not be negative, got {min(ids)}: labels are not text")
        return self._engine.decode([i for i in ids if i < self.vocab_size])

    def stable_length(self, ids: Sequence[int]) -> int:
        """How many of the first ids have a text that later ids cannot change.

        That is all but a run of byte pieces at the end, with tokens that have no text among them.
        """
        length = len(ids)
        while length and (ids[length - 1] in self._unsettled or ids[length - 1] >= self.vocab_size):
            length -= 1
        return length

    def loc(self, n: int) -> int:
        """Id of `<locNNNN>`, for n from 0 to 1023."""
        return self._added[_at(LOCATIONS, n)]

    def seg(self, n: int) -> int:
        """Id of `<segNNN>`, for n from 0 to 127."""
        return self._added[_at(SEGMENTS, n)]


def _make_engine(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Make the engine of GemmaTokenizer, with the tokens that PaliGemmaProcessor adds."""
    added = vocabulary.added
    bpe = models.BPE(
        vocab=vocabulary.pieces,
        merges=vocabulary.merges,
        unk_token=added.names["unk_token"],
        fuse_unk=True,
        byte_fallback=True,
    )
    engine = tokenizers.Tokenizer(bpe)
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    engine.add_tokens([_added_token(token) for token in added.tokens.values()])
    for token, i in added.ids.items():
        if engine.token_to_id(token) != i:
            raise ValueError(
                f"{added.file} gives the token {token!r} the id {i}, but transformers gives it "
                f"{engine.token_to_id(token)}, the next free one: use files of one checkpoint"
            )
    engine.add_tokens([*LOCATIONS, *SEGMENTS])
    engine.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    return engine


def _added_token(token: Token) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=not token.special if token.normalized is None else token.normalized,
        special=token.special,
    )


def _at(tokens: list[str], n: int) -> str:
    if not 0 <= n < len(tokens):
        raise ValueError(f"n must be from 0 to {len(tokens) - 1} ({tokens[-1]}), got {n}")
    return tokens[n]
