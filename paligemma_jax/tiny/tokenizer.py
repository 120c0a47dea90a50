"""The tokenizer of `tiny`: a small sentencepiece model of the same kind as Gemma's."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import sentencepiece

from paligemma_jax.processing.tokenizer import LOCATIONS, SEGMENTS
from paligemma_jax.tiny.digits import glyphs, load_dataset
from paligemma_jax.tiny.questions import PROMPTS, ask
from paligemma_jax.tiny.scenes import compose


def train_tokenizer(path: Path, pieces: int = 448) -> None:
    """Train a sentencepiece model with byte fallback, split digits and no normalisation, and append
    `<loc>` and `<seg>`.

    It learns from questions with their answers, and from the description that comes with the
    digits.

    Args:
        path: File to write.
        pieces: Size of the vocabulary without `<loc>` and `<seg>`.
    """
    scenes = compose(np.random.default_rng(0), glyphs(held_out=False), 500)
    texts = [text for i in range(500) for task in PROMPTS for text in ask(scenes, i, task, digit=7)]
    texts = [text for text in texts if "<loc" not in text] + load_dataset().DESCR.splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["<mask>", "\n"],
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    added = b"".join(map(_serialize_piece, LOCATIONS + SEGMENTS))
    path.write_bytes(model.getvalue() + added)


def _serialize_piece(piece: str) -> bytes:
    """Serialize a piece to append to a model: concatenated protobuf messages are merged, and their
    repeated fields appended."""
    text = piece.encode()
    message = b"\x0a" + bytes([len(text)]) + text  # the piece
    message += b"\x15" + struct.pack("<f", 0.0)  # its score
    message += b"\x18\x04"  # its type, USER_DEFINED
    return b"\x0a" + bytes([len(message)]) + message
