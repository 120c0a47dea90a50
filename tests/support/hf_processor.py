"""Toy tokenizers, and the transformers processor around them: the oracle of the processing tests, and of every test that needs one."""

import io
import random
import struct
from pathlib import Path

import sentencepiece
from transformers import AddedToken, GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil

ADDED = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
WORDS = "a cat and the dog sat on red green blue mat what color is this caption answer en detect segment ; street tree car person sky"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?<>'\"()[]{}-_/\\@#"


def train_tokenizer(path, added: bool = True, spaces: bool = False, vocabulary: int = 500) -> Path:
    """Trains a sentencepiece BPE model made as Gemma's is, and writes it to `path` (usually `.../tokenizer.model`).

    pad 0, eos 1, bos 2, unk 3, `<mask>` 4, byte fallback, no dummy prefix, no normalisation, newline runs as pieces.
    With `added` the 1,152 `<loc>` and `<seg>` pieces follow at the end, as in the released PaliGemma file (there from 256000 on).
    `spaces` also makes pieces of space runs, as Gemma has. `<image>` is never inside: transformers adds it.
    """
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS.split(), k=rng.randint(2, 9))) for _ in range(1000)] + list(ALPHABET)
    symbols = ["<mask>"] + ["\n" * n for n in range(1, 6)] + (["▁" * n for n in range(2, 8)] if spaces else [])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocabulary, hard_vocab_limit=False,
        user_defined_symbols=symbols, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue() + b"".join(map(user_defined, ADDED if added else [])))
    return path


def user_defined(piece: str) -> bytes:
    """One more USER_DEFINED piece for a serialised sentencepiece model: joining protobuf messages appends to their repeated fields."""
    text = piece.encode()
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"  # piece, score, type 4
    return b"\x0a" + bytes([len(message)]) + message


def hf_processor(directory, image_size: int, patch_size: int) -> PaliGemmaProcessor:
    """transformers' PaliGemmaProcessor with the tokenizer of `directory` (a `tokenizer.model` is enough) and the PIL image processor.

    `<loc>` and `<seg>` get their ids before `<image>` does, as in the released checkpoints; PaliGemmaProcessor alone would put `<image>` first.
    """
    tokenizer = GemmaTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    images = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    images.image_seq_length = (image_size // patch_size) ** 2
    return PaliGemmaProcessor(images, tokenizer)


def save_processor(directory, image_size: int, patch_size: int) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and processor_config.json next to `directory`/tokenizer.model, through transformers.

    Afterwards `AutoProcessor.from_pretrained(directory)` loads as it is, offline.
    """
    processor = hf_processor(directory, image_size, patch_size)
    for key in ("vocab_file", "is_local", "local_files_only"):  # how this call found the file: an absolute path, of no use elsewhere
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(str(directory))
    return Path(directory)
