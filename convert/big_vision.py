"""big_vision's .npz: layers are stacked, and there is no config and no tokenizer."""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.match import TensorEntry, Weight, describe_other_model, file_shapes, match, weights
from convert.table import BIG_VISION, BIG_VISION_IGNORED, BIG_VISION_QKV, TABLE_PATH
from convert.tensor import (
    BLOCK,
    DTYPES,
    Progress,
    Tensor,
    blocks,
    map_file,
    name_errors,
    no_progress,
    with_rows,
)
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig, with_resolution

# numpy stores bfloat16 as an opaque type of two bytes: big_vision utils.py recover_dtype.
DTYPE_NAMES = {"<f4": "float32", "<f2": "float16", "|V2": "bfloat16"}
MEMBER_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<V2"}
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError)
DAMAGED += (NotImplementedError, RuntimeError, MemoryError, SyntaxError)
TABLE, POSITION = "llm/embedder/input_embedding", "img/pos_embedding"
CHARACTERISTIC = (  # whose shapes identify a published variant
    "img/embedding/kernel",
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
    "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel",
    "llm/layers/attn/q_einsum/w",
    "llm/layers/attn/kv_einsum/w",
    "llm/layers/mlp/linear",
)


def read(file: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """Read the checkpoint of an .npz: float32, float16 or bfloat16, with or without params/ in its
    keys.

    Args:
        file: The .npz. The checksums of all members are verified.
        config: Required for a variant that was never published: shapes do not determine the query
            scale, softcaps and windows. The numerics are big_vision's in any case.

    Raises:
        ValueError: Lists everything that is wrong.
    """
    entries, notes = _members(file), []
    if config is None:
        config = infer_config({key: entry.shape for key, entry in entries.items()}, file)
        notes.append("it has no config; using that of the published variant with these shapes")
    text, vocabulary = text_rows(config), config.decoder.vocab_size
    rows = entries[TABLE].shape[0] if TABLE in entries and entries[TABLE].shape else vocabulary
    if rows not in (vocabulary, text):
        required = f"the config requires {text} or {vocabulary}"
        raise ValueError(f"{file}: its embedding table has {rows} rows, but {required}")
    tensors = match(
        entries,
        _weights(config, rows),
        dtypes=DTYPE_NAMES,
        source=file,
        config_name="the config",
        ignored=BIG_VISION_IGNORED,
    )
    table = tensors[TABLE_PATH]
    if rows < vocabulary:
        notes.append(f"{vocabulary - rows} missing rows of the vocabulary are filled with the mean")
        tensors[TABLE_PATH] = with_rows(table, vocabulary)
    config = replace(config, dtype=table.dtype.name, numerics="big_vision")
    return Checkpoint("big_vision", config, tensors, notes=tuple(notes))


def write(file: Path, checkpoint: Checkpoint, progress: Progress = no_progress) -> None:
    """Write an .npz that big_vision loads, with keys params/img/... and params/llm/..., and the
    vocabulary without `<image>` and the rows after it.

    Raises:
        ValueError: If the layers of a stacked array have different dtypes.
    """
    tensors, rows = dict(checkpoint.tensors), text_rows(checkpoint.config)
    tensors[TABLE_PATH] = with_rows(tensors[TABLE_PATH], rows)
    weights = _weights(checkpoint.config, rows)
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for key, shape in file_shapes(weights).items():
            parts = [weight for weight in weights if weight.key == key]
            dtypes = sorted({tensors[weight.path].dtype.name for weight in parts})
            if len(dtypes) > 1:
                listed = ", ".join(dtypes)
                raise ValueError(f"{key} has layers of dtypes {listed}; choose one with --dtype")
            descr = MEMBER_DTYPES[dtypes[0]]
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"params/{key}.npy"), "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)
                for weight in sorted(parts, key=lambda weight: weight.position):
                    tensor = weight.to_file(tensors[weight.path])
                    for block in name_errors(weight.path, blocks(tensor)):
                        out.write(block.reshape(-1).view(np.uint8).data)
                        progress(block.nbytes)


def text_rows(config: PaliGemmaConfig) -> int:
    """The number of vocabulary rows for text. Hugging Face checkpoints have `<image>` and padding
    after them."""
    return min(config.image_token_id, config.decoder.vocab_size)


def infer_config(shapes: dict[str, tuple[int, ...]], file: Path) -> PaliGemmaConfig:
    """The config of the published variant with these shapes. Raises ValueError if there is none."""
    post_norms = "llm/layers/post_ffw_norm/scale" in shapes
    for preset in PRESETS.values():
        expected = file_shapes(_weights(preset, preset.decoder.vocab_size))
        same = all(shapes.get(key) == expected[key] for key in CHARACTERISTIC)
        if same and preset.decoder.post_norms == post_norms:
            position = shapes.get(POSITION, ())
            is_valid = len(position) == 3 and position[1] > 0
            patches = position[1] if is_valid else preset.vision.num_patches
            return with_resolution(preset, math.isqrt(patches) * preset.vision.patch_size)
    hint = describe_other_model(shapes, CHARACTERISTIC)
    if hint:
        raise ValueError(f"{file} is not a PaliGemma{hint}")
    known = ", ".join(f"{key} {list(shapes[key])}" for key in CHARACTERISTIC if key in shapes)
    unpublished = f"{file}: no published PaliGemma has these shapes: {known}"
    raise ValueError(f"{unpublished}; give its config.json with --config")


def _weights(config: PaliGemmaConfig, rows: int) -> list[Weight]:
    """Every parameter, for a vocabulary of `rows` rows. big_vision fuses q with k and v if there
    are as many of them."""
    decoder = config.decoder
    if not decoder.tie_word_embeddings:
        reason = "this model's is not the embedding table (tie_word_embeddings is false)"
        raise ValueError(f"a big_vision .npz has no output head, and {reason}; use another format")
    table = BIG_VISION[decoder.model_type]
    if decoder.num_key_value_heads == decoder.num_attention_heads:
        fused = {row.path for row in BIG_VISION_QKV}
        table = [row for row in table if row.path not in fused] + BIG_VISION_QKV
    return weights(table, replace(config, decoder=replace(decoder, vocab_size=rows)))


def _members(file: Path) -> dict[str, TensorEntry]:
    """The arrays of an .npz by key, without params/. Raises ValueError if the file is damaged, or
    contains Python objects, which are never unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            members = {
                info.filename.removesuffix(".npy"): _member(file, archive, info) for info in infos
            }
    except DAMAGED as error:
        damage = f"{file} is truncated or not an .npz file ({error})"
        raise ValueError(f"{damage}; download it again") from None
    if len(members) < len(infos):
        raise ValueError(f"{file} has two members of the same name; download it again")
    has_prefix = any(key.startswith("params/") for key in members)
    prefix = "params/" if has_prefix else ""
    return {key.removeprefix(prefix): entry for key, entry in members.items()}


def _member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> TensorEntry:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(member)
        else:
            raise ValueError(f"{info.filename} has unknown .npy version {version}")
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} contains Python objects, which are never unpickled")
    if start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(
            f"{info.filename} has {info.file_size} bytes, which does not match {shape}"
        )
    order = "F" if is_fortran else "C"
    return TensorEntry(dtype.str, shape, partial(_open, file, info, start, dtype.str, shape, order))


def _open(
    file: Path, info: zipfile.ZipInfo, start: int, dtype: str, shape: tuple[int, ...], order: str
) -> Tensor:
    """The array of a member, from byte `start` of it: in the .npz itself, or decompressed to a
    temporary file. Verifies its checksum."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as member:
            if info.compress_type != zipfile.ZIP_STORED:
                unpacked = tempfile.TemporaryFile()  # deleted with the tensor  # noqa: SIM115
                shutil.copyfileobj(member, unpacked, BLOCK)
                unpacked.flush()
                return map_file(unpacked, start, DTYPES[DTYPE_NAMES[dtype]], shape, order)
            while member.read(BLOCK):
                pass
        with file.open("rb") as raw:
            raw.seek(info.header_offset + 26)  # the lengths of the name and the extra field
            start += info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
    except DAMAGED as error:
        damage = f"{file} is damaged in {info.filename} ({error})"
        raise ValueError(f"{damage}; download it again") from None
    return map_file(file, start, DTYPES[DTYPE_NAMES[dtype]], shape, order)
