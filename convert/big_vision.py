"""big_vision's .npz, in and out: one array for all layers, no config and no tokenizer."""

from __future__ import annotations

import shutil
import struct
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from convert.checkpoint import Checkpoint
from convert.config import check_config
from convert.match import Entry, foreign, match, pieces, shapes
from convert.table import BIG_VISION, BIG_VISION_IGNORED, BIG_VISION_QKV, WeightRow
from convert.tensor import BLOCK, DTYPES, Progress, blocks, named, stored, with_rows
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig, VisionConfig

# numpy stores bfloat16 as two bytes of nothing ("void"): big_vision utils.py recover_dtype.
DTYPE_NAMES = {"<f4": "float32", "<f2": "float16", "|V2": "bfloat16"}
DESCRIPTIONS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<V2"}
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, MemoryError, SyntaxError)
SHAPES_OF = {  # field of the config: the key and the axis of its shape that tell it
    "vision": {
        "hidden_size": ("img/embedding/kernel", 3), "patch_size": ("img/embedding/kernel", 0),
        "num_hidden_layers": ("img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", 0),
        "num_attention_heads": ("img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", 2),
        "intermediate_size": ("img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", 2),
    },
    "decoder": {
        "hidden_size": ("llm/embedder/input_embedding", 1), "num_hidden_layers": ("llm/layers/attn/q_einsum/w", 0),
        "num_attention_heads": ("llm/layers/attn/q_einsum/w", 1), "num_key_value_heads": ("llm/layers/attn/kv_einsum/w", 2),
        "head_dim": ("llm/layers/attn/q_einsum/w", 3), "intermediate_size": ("llm/layers/mlp/linear", 1),
    },
}  # fmt: skip
TABLE = "llm/embedder/input_embedding"


def read(file: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """The checkpoint of an .npz (float32, float16, bfloat16; keys with or without params/), of the variant that its shapes tell.

    `config` is needed for a variant that was never published: shapes do not say the query scale, softcaps and windows.
    The numerics it means are big_vision's. Every member's checksum is verified. ValueError telling all that is wrong.
    """
    entries = _members(file)
    notes = [] if config else ["it has no config: that of the published variant with these shapes is taken"]
    config = config or infer_config({key: entry.shape for key, entry in entries.items()}, file)
    rows = entries[TABLE].shape[0] if TABLE in entries and entries[TABLE].shape else config.decoder.vocab_size
    if rows not in (config.decoder.vocab_size, text_rows(config)):
        raise ValueError(f"{file}: its embedding table has {rows} rows, the config asks for {text_rows(config)} or {config.decoder.vocab_size}")
    in_file = replace(config, decoder=replace(config.decoder, vocab_size=rows))
    found = pieces(_table(config), in_file)
    tensors = match(entries, found, DTYPE_NAMES, file, "the config", ignored=BIG_VISION_IGNORED)
    table = tensors["decoder/embedder/table"]
    if rows < config.decoder.vocab_size:
        notes.append(f"{config.decoder.vocab_size - rows} rows of the vocabulary that have no text are filled with the mean of the others")
        tensors["decoder/embedder/table"] = with_rows(table, config.decoder.vocab_size)
    config = replace(config, dtype=table.dtype.name, numerics="big_vision")
    return Checkpoint("big_vision", config, tensors, notes=tuple(notes))


def write(file: Path, checkpoint: Checkpoint, progress: Progress = lambda n: None) -> None:
    """Writes an .npz that big_vision loads: keys params/img/..., params/llm/..., no rows of the vocabulary from `<image>` on.

    The layers of a stacked array must have one dtype: ValueError otherwise.
    """
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    rows = text_rows(config)
    tensors["decoder/embedder/table"] = with_rows(tensors["decoder/embedder/table"], rows)
    found = pieces(_table(config), replace(config, decoder=replace(config.decoder, vocab_size=rows)))
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for key, whole in shapes(found).items():
            parts = sorted((piece for piece in found if piece.key == key), key=lambda piece: piece.position)
            dtypes = {tensors[piece.path].dtype for piece in parts}
            if len(dtypes) > 1:
                raise ValueError(f"{key}: its layers have dtypes {', '.join(sorted(map(str, dtypes)))}; give one with --dtype")
            with archive.open(zipfile.ZipInfo(f"params/{key}.npy"), "w", force_zip64=True) as member:
                header = {"descr": DESCRIPTIONS[dtypes.pop().name], "fortran_order": False, "shape": whole}
                np.lib.format.write_array_header_1_0(member, header)
                for piece in parts:
                    for block in named(piece.path, blocks(piece.there(tensors[piece.path]))):
                        member.write(block.reshape(-1).view(np.uint8).data)
                        progress(block.nbytes)


def text_rows(config: PaliGemmaConfig) -> int:
    """The rows of the vocabulary that stand for text: in Hugging Face checkpoints `<image>` comes after them, then padding."""
    return min(config.image_token_id, config.decoder.vocab_size)


def infer_config(shapes: dict[str, tuple[int, ...]], file: Path) -> PaliGemmaConfig:
    """The published variant that has these shapes; ValueError if there is none."""
    needed = {key for fields in SHAPES_OF.values() for key, _ in fields.values()} | {"img/pos_embedding"}
    if missing := sorted(key for key in needed if len(shapes.get(key, ())) < 2 or not 0 < min(shapes[key]) <= max(shapes[key]) < 2**20):
        raise ValueError(f"{file} is no PaliGemma of big_vision's{foreign(shapes, needed)}; missing or mis-shaped are {', '.join(missing)}")
    sizes = {tower: {name: shapes[key][axis : axis + 1] for name, (key, axis) in fields.items()} for tower, fields in SHAPES_OF.items()}
    vision, decoder = ({name: size[0] if size else 0 for name, size in fields.items()} for fields in sizes.values())
    if vision["num_hidden_layers"] > 1000 or min(vision.values()) < 1:
        raise ValueError(f"{file}: its image encoder has the shapes of no SigLIP: {vision}")
    kind = "gemma2" if "llm/layers/post_ffw_norm/scale" in shapes else "gemma"
    for preset in PRESETS.values():
        if preset.decoder.model_type == kind and all(getattr(preset.decoder, name) == size for name, size in decoder.items()):
            size = round(shapes["img/pos_embedding"][1] ** 0.5) * vision["patch_size"]
            return check_config(replace(preset, vision=VisionConfig(image_size=size, **vision)), str(file))
    described = ", ".join(f"{name} {size}" for name, size in decoder.items())
    raise ValueError(f"{file}: no published PaliGemma has a {kind} decoder with {described}; give its config.json with --config")


def _table(config: PaliGemmaConfig) -> list[WeightRow]:
    """big_vision fuses q with k and v where there are as many of them."""
    rows = BIG_VISION[config.decoder.model_type]
    if config.decoder.num_key_value_heads < config.decoder.num_attention_heads:
        return rows
    fused = {path for _, _, path, _ in BIG_VISION_QKV}
    return [row for row in rows if row[2] not in fused] + BIG_VISION_QKV


def _members(file: Path) -> dict[str, Entry]:
    """key without params/ -> Entry. ValueError if the file is damaged, or holds Python objects, which are never unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            found = {info.filename.removesuffix(".npy"): _member(file, archive, info) for info in infos}
    except DAMAGED as error:
        raise ValueError(f"{file} is truncated or not an .npz file ({error}); download it again") from None
    if len(found) < len(infos):
        raise ValueError(f"{file} has two members of one name; it is damaged")
    if not any(key.startswith("params/") for key in found):
        return found
    return {key.removeprefix("params/"): entry for key, entry in found.items()}


def _member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise ValueError(f"{info.filename} has the unknown version {version}")
        shape, fortran, dtype = reader(member)
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects; they are never unpickled")
    if start + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size} bytes, which its shape {shape} does not account for")
    order = "F" if fortran else "C"
    return Entry(dtype.str, shape, lambda: stored(*_data(file, info, start), DTYPES[DTYPE_NAMES[dtype.str]], shape, order))


def _data(file: Path, info: zipfile.ZipInfo, start: int) -> tuple[Path | IO[bytes], int]:
    """Where the array of a member lies: in the .npz itself, or unpacked into a temporary file. Its checksum is verified on the way."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as member:
            if info.compress_type != zipfile.ZIP_STORED:
                unpacked = tempfile.TemporaryFile()  # gone when the tensor is  # noqa: SIM115
                shutil.copyfileobj(member, unpacked, BLOCK)
                unpacked.flush()
                return unpacked, start
            while member.read(BLOCK):
                pass
        with file.open("rb") as raw:
            raw.seek(info.header_offset + 26)
            name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
        return file, info.header_offset + 30 + name + extra + start
    except DAMAGED as error:
        raise ValueError(f"{file} is damaged in {info.filename} ({error}); download it again") from None
