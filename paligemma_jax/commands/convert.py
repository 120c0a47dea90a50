"""`paligemma-jax convert` and `paligemma-jax convert inspect`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from convert.files import user_path
from paligemma_jax.commands.options import File, dumps, flag

if TYPE_CHECKING:
    from convert import Checkpoint
    from convert.tensor import Progress
    from paligemma_jax.checkpoints.source import CheckpointSource

Source = Annotated[str, tyro.conf.Positional, flag("SRC")]
Destination = Annotated[str, tyro.conf.Positional, flag("DST")]
Inspected = Annotated[str, tyro.conf.Positional, flag("CKPT")]
To = Annotated[
    Literal["jax", "huggingface", "big_vision"] | None,
    flag("{jax,huggingface,big_vision}", "jax with --quantize, otherwise required"),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    flag("{float32,bfloat16,float16}", "each tensor keeps its own"),
]
Pixels = Annotated[int | None, flag("PIXELS", "that of SRC")]
Numerics = Annotated[
    Literal["transformers", "big_vision"] | None,
    flag("{transformers,big_vision}", "the one that SRC implies"),
]
Format = Annotated[str | None, flag("FORMAT", "that of SRC with --to jax; otherwise none")]
Config = Annotated[str | None, flag("PATH", "the checkpoint's own")]
Base = Annotated[str | None, flag("CKPT", "the one that SRC names")]
Size = Annotated[str | None, flag("SIZE", "the shards of SRC, or 5GB")]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    source: Source,
    destination: Destination,
    to: To = None,
    dtype: Dtype = None,
    resolution: Pixels = None,
    numerics: Numerics = None,
    quantize: Format = None,
    calibrate: File = None,
    calibration_rows: int = 128,
    config: Config = None,
    base: Base = None,
    max_shard_size: Size = None,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Convert a checkpoint to another format; `convert inspect CKPT` describes one.

    Example: paligemma-jax convert paligemma2-3b my-checkpoint --to jax --verify

    Args:
        source: Checkpoint to convert: a Hugging Face directory, a converted checkpoint, a
            big_vision .npz, or an adapter of peft, which is merged into its base.
        destination: Output directory, or .npz file for big_vision. It appears once it is complete.
        to: Format to write.
        dtype: Dtype of every tensor.
        resolution: Resize the position embeddings for images of this size.
        numerics: Numerics profile to record.
        quantize: Quantize to 8 or 4 bits: int8, w8a8, int4, nf4, or a list by part, such as
            nf4-32-double,embedding=int8,vision=int8.
        calibrate: JSONL of rows with image, prefix and suffix, as for `finetune`: choose the 4-bit
            codes of the decoder for these rows (GPTQ). The format stays the same.
        calibration_rows: Number of rows to read from it.
        config: A config.json to use for SRC, or a Hugging Face directory, whose tokenizer is then
            copied too.
        base: Base checkpoint of an adapter.
        max_shard_size: Maximum size of a safetensors file, such as 5GB.
        verify: Read DST back and compare every tensor.
        force: Replace DST if it exists.
        dry_run: Write nothing; print the tensors with shapes, dtypes and bytes.
    """
    max_shard = _parse_size(max_shard_size) if max_shard_size is not None else None
    if to is None and quantize is None:
        raise ValueError("--to is required: jax, huggingface or big_vision")
    to = to or "jax"
    from convert import formats

    opened = _open_run(source, base)
    base_directory = _base_directory(source, base) if isinstance(opened, str) else None
    if calibrate is not None:
        from paligemma_jax.inference.calibration import calibrate_checkpoint

        checkpoint = formats.read(opened, config, base_directory)
        checkpoint = formats.change(checkpoint, to, dtype, resolution, numerics)
        tokenizer = _tokenizer_source(source, base, config)
        opened = calibrate_checkpoint(checkpoint, tokenizer, quantize, calibrate, calibration_rows)
        dtype = resolution = numerics = None
    if dry_run:
        checkpoint = formats.read(opened, config, base_directory)
        checkpoint = formats.change(checkpoint, to, dtype, resolution, numerics, quantize)
        _print_tensors(checkpoint, to)
        return
    checkpoint = formats.convert(
        opened,
        destination,
        to,
        dtype=dtype,
        resolution=resolution,
        numerics=numerics,
        quantize=quantize,
        config=config,
        base=base_directory,
        max_shard=max_shard,
        force=force,
        verify=verify,
        progress=_progress,
    )
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    size = f"{len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 1e6:,.1f} MB"
    print(f"{Path(destination)}: {to}, {size}{', verified' if verify else ''}")


def inspect(
    source: Inspected, config: Config = None, json: tyro.conf.FlagCreatePairsOff[bool] = False
) -> None:
    """Describe a checkpoint: format, variant, size, dtypes, files, anything unusual.

    Example: paligemma-jax convert inspect my-checkpoint

    Args:
        source: Checkpoint to describe.
        config: A config.json to use, or a Hugging Face directory with one.
        json: Print one JSON object.
    """
    from convert import inspect

    description = inspect(_open_run(source), config)
    if json:
        print(dumps(description))
        return
    for name, value in description.items():
        if isinstance(value, dict):
            lines = [", ".join(f"{key} ({count})" for key, count in value.items())]
        elif isinstance(value, list):
            lines = value or ["none"]
        else:
            is_count = isinstance(value, int) and name != "resolution"
            lines = [f"{value:,}" if is_count else str(value)]
        print(f"{name:11} " + ("\n" + " " * 12).join(lines))


def _base_directory(source: str, base: str | None) -> Path | None:
    """Where the base checkpoint of an adapter is; it is downloaded if it is on the Hub."""
    from convert import peft
    from paligemma_jax.checkpoints.source import resolve

    if peft.is_adapter(user_path(source)):
        return resolve(base or source).weights
    if base is not None:
        raise ValueError(f"--base requires an adapter, but {source} is none")
    return None


def _open_run(source: str, base: str | None = None) -> str | Checkpoint:
    """Open the model of a run or of one of its checkpoints; other sources are returned as given."""
    from paligemma_jax.checkpoints.runs import is_run, is_state
    from paligemma_jax.checkpoints.source import resolve

    if not is_run(user_path(source)) and not is_state(user_path(source)):
        return source
    found = resolve(source, base=base)
    if found.note:
        print(f"paligemma-jax: {found.note}", file=sys.stderr)
    return found.merged


def _tokenizer_source(source: str, base: str | None, config: str | None) -> CheckpointSource:
    """The checkpoint whose tokenizer and image settings the converted one has."""
    from paligemma_jax.checkpoints.source import resolve

    if config is not None and user_path(config).is_dir():
        return resolve(config)
    return resolve(source, base=base)


def _print_tensors(checkpoint: Checkpoint, to: str) -> None:
    shapes = {path: " x ".join(map(str, t.shape)) for path, t in checkpoint.tensors.items()}
    width, shape_width = max(map(len, shapes)), max(map(len, shapes.values()))
    for path, tensor in checkpoint.tensors.items():
        shape, dtype = f"{shapes[path]:{shape_width}}", f"{tensor.dtype.name:8}"
        print(f"{path:{width}}  {shape}  {dtype}  {tensor.nbytes:>14,}")
    formats = f"from {checkpoint.format} to {to}"
    print(f"{len(shapes)} tensors, {checkpoint.nbytes:,} bytes, {formats}")


@contextmanager
def _progress(name: str, nbytes: int) -> Iterator[Progress]:
    """Show a progress bar on a terminal, or print lines to a log after the first half minute."""
    from paligemma_jax.data.progress import progress_bar

    leave = sys.stderr.isatty()
    bar = progress_bar(None, name, nbytes, "B", show=True, leave=leave, unit_scale=True)
    with bar:
        yield bar.update


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*) *([a-z]*)", text, re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"--max-shard-size must be a size like 5GB, got {text!r}")
    size = int(float(match[1]) * unit)
    if size < 1:
        raise ValueError(f"--max-shard-size must be at least 1 byte, got {text!r}")
    return size
