"""Read the pieces of a sentencepiece `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

# The fields of sentencepiece_model.proto that are read. (The module that sentencepiece generates
# from it loads only with a protobuf that is at least as new as the generator.)
SCHEMA = """
name: "tokenizer_model.proto"
message_type {
  name: "Piece"
  field { name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
}
message_type {
  name: "Trainer"
  field { name: "algorithm" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
}
message_type {
  name: "Normalizer"
  field { name: "rules" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "prefix" number: 3 label: LABEL_OPTIONAL type: TYPE_BOOL default_value: "true" }
  field { name: "strip" number: 4 label: LABEL_OPTIONAL type: TYPE_BOOL default_value: "true" }
}
message_type {
  name: "Model"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Piece" }
  field { name: "trainer" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Trainer" }
  field {
    name: "normalizer" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Normalizer"
  }
}
"""
BPE = 2  # TrainerSpec.ModelType
# ModelProto.SentencePiece.Type, where transformers adds the piece as a token that is never split
CONTROL, USER_DEFINED = 3, 4


def read_pieces(file: Path) -> dict[str, int]:
    """Return the type of each piece, in the order of their ids.

    Raises:
        ValueError: The file cannot be read, or is not a sentencepiece model like Gemma's: BPE
            without normalization.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {file}: {error.strerror}") from None
    try:
        model = _message_class().FromString(content)
        pieces = {piece.text.decode(): piece.type for piece in model.pieces}
    except (DecodeError, UnicodeDecodeError):
        pieces = {}
    if not pieces or len(pieces) != len(model.pieces):
        raise ValueError(
            f"{file} ({len(content)} bytes) is not a sentencepiece model: download it again "
            "(it may be a Git LFS pointer)"
        )
    rules = model.normalizer
    if model.trainer.algorithm != BPE or rules.rules or rules.prefix or rules.strip:
        raise ValueError(
            f"{file} must be a BPE model without normalization, as Gemma's is: use the "
            "tokenizer.model of the checkpoint"
        )
    return pieces


def generate_merges(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, best first: all pairs of pieces that make a piece, by its
    id, then by the length of the first half. Sentencepiece does not store them.

    As transformers' `generate_merges`.
    """
    known = frozenset(pieces)
    return [
        (piece[:n], piece[n:])
        for piece in pieces
        for n in range(1, len(piece))
        if piece[:n] in known and piece[n:] in known
    ]


@cache
def _message_class() -> Any:  # its fields are known at run time only
    pool = DescriptorPool()
    pool.Add(text_format.Parse(SCHEMA, FileDescriptorProto()))
    return GetMessageClass(pool.FindMessageTypeByName("Model"))
