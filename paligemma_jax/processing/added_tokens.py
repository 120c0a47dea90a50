"""Read the tokens that a checkpoint adds to its vocabulary, as transformers 5.23 does.

Releases 4 of transformers list them in `added_tokens_decoder` of tokenizer_config.json, which wins.
Without it they come from tokenizer.json, and from the older added_tokens.json and
special_tokens_map.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from convert.typed_json import TokenId, load_json

IMAGE = "<image>"
CONFIG, IDS, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
# GemmaTokenizer's names of its special tokens
DEFAULTS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
Content = TypeVar("Content")


class Token(Struct, frozen=True, kw_only=True):
    """A token that is matched before the text is split, as `tokenizers.AddedToken`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # by default unless it is special
    special: bool = False  # omitted from decoded text


class NumberedToken(Token, frozen=True, kw_only=True):
    """An entry of `added_tokens` in tokenizer.json."""

    id: TokenId


Name = str | Token | None | UnsetType
Names = list[str | Token] | None | UnsetType


class _SpecialTokens(Struct, kw_only=True):
    """special_tokens_map.json. The fields are in the order in which transformers adds them."""

    bos_token: Name = UNSET
    eos_token: Name = UNSET
    unk_token: Name = UNSET
    sep_token: Name = UNSET
    pad_token: Name = UNSET
    cls_token: Name = UNSET
    mask_token: Name = UNSET
    extra_special_tokens: Names | dict[str, str | Token] = UNSET
    additional_special_tokens: Names = UNSET  # of releases 4


class _Config(_SpecialTokens, kw_only=True):
    """tokenizer_config.json."""

    tokenizer_class: Literal["GemmaTokenizer", "GemmaTokenizerFast"] | None = None
    added_tokens_decoder: dict[TokenId, Token] | UnsetType = UNSET
    split_special_tokens: bool = False
    image_token: Literal["<image>"] | None = None


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that the files beside a tokenizer add to it."""

    tokens: dict[str, Token]  # by content, in the order in which those without a piece get ids
    ids: dict[str, int]  # those that a file states
    file: Path  # that states the ids
    names: dict[str, str]  # "bos_token" -> "<bos>"


def read_added_tokens(
    tokenizer: Path, listed: Iterable[NumberedToken] = (), pieces: Iterable[Token] = ()
) -> AddedTokens:
    """Read the files beside a tokenizer.

    Args:
        tokenizer: Path of tokenizer.json or tokenizer.model.
        listed: `added_tokens` of tokenizer.json.
        pieces: Pieces of tokenizer.model to add, unless the files list special tokens.

    Raises:
        ValueError: A file cannot be used.
    """
    directory = tokenizer.parent
    config = _load(directory / CONFIG, _Config)
    if config.split_special_tokens:
        raise ValueError(f"{directory / CONFIG}: split_special_tokens must be false, got true")
    stated, file, older = config.added_tokens_decoder, directory / CONFIG, _SpecialTokens()
    if stated is UNSET:
        older = _load(directory / NAMES, _SpecialTokens)
        file = tokenizer if tokenizer.suffix == ".json" else directory / IDS
    names, others = _special_tokens(config, older)
    if stated is UNSET:
        special = {token.content for token in (*names.values(), *(others or []))}
        ids = _load(directory / IDS, dict[str, TokenId])
        stated = {i: Token(content=text, special=text in special) for text, i in ids.items()}
        stated |= {token.id: token for token in listed}
    if others is None:
        old = older.additional_special_tokens or []
        others = list(pieces) or [_special(token) for token in old]
    return _in_order(stated, file, names, others)


def _in_order(
    stated: Mapping[int, Token], file: Path, names: Mapping[str, Token], others: Iterable[Token]
) -> AddedTokens:
    """Order the tokens: those with an id, then special ones that no file gives an id."""
    tokens: dict[str, Token] = {}
    for _, token in sorted(stated.items()):
        tokens.setdefault(token.content, token)
    for token in names.values():
        tokens[token.content] = replace(tokens.get(token.content, token), special=True)
    for token in others:
        if token.content != IMAGE:  # PaliGemmaProcessor adds it, after <loc> and <seg> here
            tokens.setdefault(token.content, token)
    ids = {token.content: i for i, token in stated.items()}
    return AddedTokens(tokens, ids, file, {name: token.content for name, token in names.items()})


def _special_tokens(
    config: _Config, older: _SpecialTokens
) -> tuple[dict[str, Token], list[Token] | None]:
    """The special tokens that have a name, and the others if they are listed."""
    names: dict[str, Token] = {}
    for name in [name for name in _SpecialTokens.__struct_fields__ if name.endswith("_token")]:
        values = [getattr(older, name), getattr(config, name), DEFAULTS.get(name)]
        value = next(value for value in values if value is not UNSET)
        if value is not None:
            names[name] = _special(value)
    extra, old = config.extra_special_tokens, config.additional_special_tokens
    others: list[Token] | None = None
    for tokens in (extra if extra or old is UNSET else old, older.extra_special_tokens):
        if isinstance(tokens, dict):
            names |= {name: _special(token) for name, token in tokens.items()}
            others = None
        elif tokens is not UNSET:
            others = [*(others or []), *map(_special, tokens or [])]
    return names, others


def _special(token: str | Token) -> Token:
    return Token(content=token, special=True) if isinstance(token, str) else token


def _load(file: Path, kind: type[Content]) -> Content:
    return load_json(file, kind) if file.is_file() else kind()
