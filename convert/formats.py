"""All formats behind one interface: read, write, convert and verify checkpoints."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from convert import big_vision, huggingface, orbax, peft
from convert.adapter import merge
from convert.checkpoint import Checkpoint
from convert.config import check_quantization, load_config
from convert.files import atomic_output, companion_files, user_path
from convert.quantized import dequantize_checkpoint, quantize_checkpoint
from convert.table import TABLE_PATH
from convert.tensor import Progress, equal, no_progress, with_rows
from convert.typed_json import load_json
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import Quantization

FORMATS = {"huggingface": huggingface, "jax": orbax, "big_vision": big_vision}
Stage = Callable[[str, int], AbstractContextManager[Progress]]  # takes a name and a number of bytes


def detect_format(source: Path) -> str:
    """The format of a file or directory. Raises ValueError if it is not a checkpoint."""
    if source.is_file():
        if zipfile.is_zipfile(source) or source.suffix == ".npz":
            return "big_vision"
        is_part = source.suffix in (".safetensors", ".json")
        hint = f"use its directory, {source.parent}" if is_part else "a single file must be an .npz"
        raise ValueError(f"{source} is not a checkpoint; {hint}")
    if not source.is_dir():
        raise ValueError(f"{source} does not exist")
    if (source / orbax.CONFIG).exists():
        return "jax"
    if (source / "_METADATA").exists() or (source / orbax.PARAMS / "_METADATA").exists():
        other = "an Orbax checkpoint of another program"
        raise ValueError(f"{source} is {other}: it has no {orbax.CONFIG}")
    return "huggingface"


def read(
    source: str | Path | Checkpoint,
    config: PaliGemmaConfig | str | Path | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """Read a checkpoint: a Hugging Face directory, one of this project's own, a big_vision .npz, or
    an adapter of peft, which is merged into its base.

    Names, shapes and dtypes of all tensors are checked; no tensor is read.

    Args:
        source: The directory or file. A checkpoint that is open already is returned unchanged.
        config: Used in place of the source's own; required for an .npz of an unpublished variant. A
            PaliGemmaConfig, a config.json, or a Hugging Face directory, whose tokenizer and
            processor are then included.
        base: The base checkpoint of an adapter; by default the directory that its config names.

    Raises:
        ValueError: Lists everything that is wrong with the source.
    """
    if isinstance(source, Checkpoint):
        return source
    source = user_path(source)
    if peft.is_adapter(source):
        base = user_path(base or peft.base_checkpoint(source))
        if peft.is_adapter(base):
            raise ValueError(f"the base of {source} must be a model, but {base} is an adapter too")
        checkpoint = read(base, config)
        return merge(checkpoint, peft.read(source, checkpoint.config))
    directory, format = None, detect_format(source)
    if isinstance(config, str | Path):
        path = user_path(config)
        directory = path if path.is_dir() else None
        config = load_config(path)
        if format == "huggingface" and (source / "config.json").exists():
            check_quantization(load_json(source / "config.json"))
    checkpoint = FORMATS[format].read(source, config)
    return checkpoint.with_files(companion_files(directory)) if directory else checkpoint


def write(
    checkpoint: Checkpoint,
    destination: str | Path,
    to: str,
    *,
    force: bool = False,
    max_shard: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write a checkpoint. `destination` appears only when it is complete.

    Args:
        checkpoint: Any checkpoint; unquantized unless `to` is "jax".
        destination: A directory, or an .npz for big_vision.
        to: "jax", "huggingface" or "big_vision".
        force: Replace an existing destination.
        max_shard: Maximum bytes per safetensors file, for "huggingface".
        progress: Called with the number of bytes of each write.

    Raises:
        ValueError: If the destination exists, if the disk is too full, or if a number is beyond the
            range of the new dtype.
    """
    if to not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {to!r}")
    if max_shard and to != "huggingface":
        raise ValueError(f"--max-shard-size applies to safetensors files; {to} has none")
    options = {"max_shard": max_shard} if max_shard else {}
    with atomic_output(user_path(destination), force, checkpoint.nbytes) as path:
        FORMATS[to].write(path, checkpoint, progress, **options)


def convert(
    source: str | Path | Checkpoint,
    destination: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    resolution: int | None = None,
    numerics: str | None = None,
    quantize: str | None = None,
    config: str | Path | None = None,
    base: str | Path | None = None,
    max_shard: int | None = None,
    force: bool = False,
    verify: bool = False,
    progress: Stage | None = None,
) -> Checkpoint:
    """Convert a checkpoint of any format to any other, tensor by tensor.

    Args:
        source, config, base: As in `read`.
        destination, to, force, max_shard: As in `write`.
        dtype: "float32", "bfloat16" or "float16"; by default each tensor keeps its own.
        resolution: Resample the position embeddings for images of this many pixels.
        numerics: The profile to record, "transformers" or "big_vision".
        quantize: A quantization (`Quantization.parse`), for "jax" only. Other formats get a
            quantized source dequantized.
        verify: Read the result back and compare every tensor, bit by bit.
        progress: Called with the name and the bytes of a stage; returns a context manager that
            yields a function to call with the bytes of each write.

    Returns:
        The checkpoint that was written, with its tensors still in the source.

    Raises:
        ValueError: The conversion is not possible. The destination is then unchanged.
    """
    destination = user_path(destination)
    if not isinstance(source, Checkpoint):
        path = user_path(source).resolve()
        if destination.resolve() in (path, *path.parents):
            raise ValueError(f"{destination} is or contains the source; choose another name")
    checkpoint = read(source, config, base)
    checkpoint = change(checkpoint, to, dtype, resolution, numerics, quantize)
    stage = progress or (lambda name, nbytes: nullcontext(no_progress))
    with stage("writing", checkpoint.nbytes) as advance:
        write(checkpoint, destination, to, force=force, max_shard=max_shard, progress=advance)
    if verify:
        with stage("verifying", checkpoint.nbytes) as advance:
            check_equal(checkpoint, read(destination, checkpoint.config), advance)
    return checkpoint


def change(
    checkpoint: Checkpoint,
    to: str,
    dtype: str | None = None,
    resolution: int | None = None,
    numerics: str | None = None,
    quantize: str | None = None,
) -> Checkpoint:
    """The checkpoint as `convert` writes it, with the same arguments."""
    if quantize and to != "jax":
        raise ValueError(f"{to} checkpoints cannot be quantized; use --to jax")
    checkpoint = checkpoint.with_dtype(dtype).with_resolution(resolution).with_numerics(numerics)
    checkpoint = quantize_checkpoint(checkpoint, Quantization.parse(quantize))
    return checkpoint if to == "jax" else dequantize_checkpoint(checkpoint)


def check_equal(expected: Checkpoint, actual: Checkpoint, progress: Progress = no_progress) -> None:
    """Compare two checkpoints bit by bit. If one is an .npz, only the vocabulary rows for text are
    compared, since it has no others.

    Raises:
        ValueError: Names the first tensors that differ.
    """
    is_npz = "big_vision" in (expected.format, actual.format)
    rows = big_vision.text_rows(expected.config)
    different = []
    for path, tensor in expected.tensors.items():
        pair = tensor, actual.tensors[path]
        if is_npz and path == TABLE_PATH:
            pair = with_rows(pair[0], rows), with_rows(pair[1], rows)
        if not equal(*pair):
            different.append(path)
        progress(tensor.nbytes)
    if different:
        listed, count = ", ".join(different[:5]), len(different)
        raise ValueError(f"verification failed; tensors that differ ({count}): {listed}")
