"""Toy tokenizers, and the transformers processor around them: the reference of the processing
tests."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import sentencepiece
from transformers import AddedToken, GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil

ADDED = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
WORDS = (
    "a cat and the dog sat on red green blue mat what color is this caption answer en detect "
    "segment ; street tree car person sky"
)
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?<>'\"()[]{}-_/\\@#"


def train_tokenizer(path, added: bool = True, spaces: bool = False, vocabulary: int = 500) -> Path:
    """Train a sentencepiece BPE model like Gemma's, and write it to `path`.

    pad 0, eos 1, bos 2, unk 3, `<mask>` 4, byte fallback, no dummy prefix, no normalization, runs
    of newlines as pieces. `<image>` is never included: transformers adds it.

    Args:
        path: Usually `.../tokenizer.model`.
        added: Append the 1,152 `<loc>` and `<seg>` pieces, as in the released PaliGemma file (there
            from 256000 on).
        spaces: Include pieces of several spaces, as in Gemma.
        vocabulary: Size without the added pieces.
    """
    rng, model = random.Random(0), io.BytesIO()
    words = WORDS.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(1000)]
    symbols = ["<mask>"] + ["\n" * n for n in range(1, 6)]
    symbols += ["▁" * n for n in range(2, 8)] if spaces else []
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + list(ALPHABET)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        user_defined_symbols=symbols,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
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
        unk_piece="<unk>",
        minloglevel=2,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue() + b"".join(map(user_defined, ADDED if added else [])))
    return path


def user_defined(piece: str) -> bytes:
    """Serialize a USER_DEFINED piece to append to a serialized sentencepiece model. (Joining
    protobuf messages appends to their repeated fields.)"""
    text = piece.encode()
    name, score, kind = (
        b"\x0a" + bytes([len(text)]) + text,
        b"\x15" + struct.pack("<f", 0),
        b"\x18\x04",
    )
    message = name + score + kind
    return b"\x0a" + bytes([len(message)]) + message


def hf_processor(directory, image_size: int, patch_size: int) -> PaliGemmaProcessor:
    """transformers' PaliGemmaProcessor with the `tokenizer.model` of a directory, and the PIL image
    processor.

    `<loc>` and `<seg>` get their ids before `<image>`, as in the released checkpoints;
    PaliGemmaProcessor alone would put `<image>` first.
    """
    tokenizer = GemmaTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    images = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    images.image_seq_length = (image_size // patch_size) ** 2
    return PaliGemmaProcessor(images, tokenizer)


def save_processor(directory, image_size: int, patch_size: int) -> Path:
    """Write tokenizer.json, tokenizer_config.json and processor_config.json with transformers, so
    that `AutoProcessor.from_pretrained(directory)` works offline."""
    processor = hf_processor(directory, image_size, patch_size)
    for key in ("vocab_file", "is_local", "local_files_only"):  # absolute paths of this machine
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(str(directory))
    return Path(directory)
