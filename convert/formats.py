"""The formats, and what can be done with all of them: find out which, read, convert, verify, describe."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert import big_vision, huggingface, orbax
from convert.checkpoint import Checkpoint, contents
from convert.files import companions, output
from convert.quantized import dequantize_checkpoint, quantize_checkpoint
from convert.tensor import Progress, Tensor, equal, with_rows
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig, with_resolution
from paligemma_jax.model.precision import Quantization

FORMATS: dict[str, Any] = {"huggingface": huggingface, "jax": orbax, "big_vision": big_vision}
QUIET: Progress = lambda n: None


def detect(source: Path) -> str:
    """The format of a file or directory; ValueError that says what it is instead, as far as one can tell."""
    if source.is_file():
        if zipfile.is_zipfile(source) or source.suffix == ".npz":
            return "big_vision"
        whole = f"give its directory, {source.parent}" if source.suffix in (".safetensors", ".json") else "a checkpoint in one file is an .npz"
        raise ValueError(f"{source} is not a checkpoint; {whole}")
    if not source.is_dir():
        raise ValueError(f"{source} does not exist")
    if (source / orbax.CONFIG).exists():
        return "jax"
    if (source / "_METADATA").exists() or (source / "params" / "_METADATA").exists():
        raise ValueError(f"{source} is an Orbax checkpoint of another program: it has no {orbax.CONFIG}")
    return "huggingface"


def read(source: str | Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """The checkpoint at `source`: a Hugging Face directory, one of this project's own, or a big_vision .npz.

    Names, shapes and dtypes of all tensors are checked here, and told in one ValueError; no tensor is read.
    config: in the place of the source's own; an .npz of a variant that was never published needs one.
    """
    source = Path(source).expanduser()
    return FORMATS[detect(source)].read(source, config)


def load_config(source: Path) -> PaliGemmaConfig:
    """The config of a checkpoint alone. ValueError as in `read`."""
    kind = detect(source)
    return huggingface.load_config(source) if kind == "huggingface" else FORMATS[kind].read(source).config


def write(
    checkpoint: Checkpoint, destination: str | Path, to: str, *, force: bool = False, max_shard: int | None = None, progress: Progress = QUIET
) -> None:
    """Writes `checkpoint` to `destination` as "jax", "huggingface" or "big_vision"; it appears there only when complete.

    force: replace what is there.  max_shard: most bytes of one safetensors file.  progress: called with every number of bytes written.
    ValueError if the destination exists, if the disk is too full, or if a number is beyond the range of the new dtype.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    if max_shard and to != "huggingface":
        raise ValueError(f"--max-shard-size is of safetensors files: {to} has none")
    options = {"max_shard": max_shard} if to == "huggingface" else {}
    with output(Path(destination).expanduser(), force, checkpoint.nbytes) as path:
        FORMATS[to].write(path, checkpoint, progress, **options)


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    resolution: int | None = None,
    numerics: str | None = None,
    quantize: str | None = None,
    config: str | Path | None = None,
    max_shard: int | None = None,
    force: bool = False,
    verify: bool = False,
    progress: Callable[[str, int], Any] | None = None,
) -> Checkpoint:
    """Converts a checkpoint of any format to any other, tensor by tensor; returns what was written, as read from the source.

    dtype: "float32", "bfloat16", "float16"; by default every tensor keeps its own.  resolution: pixels, see `Checkpoint.with_resolution`.
    numerics: the profile to record.
    quantize: what to hold in 8 or 4 bits (`Quantization.of`), in "jax" only; the others get what the codes of a quantized source stand for.
    config: a config.json to take in the place of the source's, or a Hugging Face directory, whose tokenizer and processor then come along
    too.  verify: read the result back and compare every tensor, bit by bit.
    progress: given the name and the bytes of a stage, returns a context manager that gives a function of the bytes done (tqdm does).
    ValueError, in words for the user, for everything that can be wrong; the destination then is as it was.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    if destination.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{destination} is the source itself, or holds it; give another name")
    checkpoint = with_changes(opened(source, config), to, dtype=dtype, resolution=resolution, numerics=numerics, quantize=quantize)
    stage = progress or (lambda name, nbytes: nullcontext(QUIET))
    with stage("writing", checkpoint.nbytes) as advance:
        write(checkpoint, destination, to, force=force, max_shard=max_shard, progress=advance)
    if verify:
        with stage("verifying", checkpoint.nbytes) as advance:
            compare(checkpoint, read(destination, checkpoint.config), advance)
    return checkpoint


def with_changes(
    checkpoint: Checkpoint, to: str, dtype: str | None = None, resolution: int | None = None, numerics: str | None = None, quantize: str | None = None
) -> Checkpoint:
    """The checkpoint as it is to be written (see `convert`)."""
    if quantize and to != "jax":
        raise ValueError(f"{to} checkpoints hold no quantized weights: write --to jax")
    checkpoint = quantize_checkpoint(checkpoint.with_dtype(dtype).with_resolution(resolution).with_numerics(numerics), Quantization.parse(quantize))
    return checkpoint if to == "jax" else dequantize_checkpoint(checkpoint)


def opened(source: Path, config: str | Path | None) -> Checkpoint:
    """`read`, with the config and the accompanying files of `config` (see `convert`)."""
    if config is None:
        return read(source)
    file = Path(config).expanduser()
    directory = file if file.is_dir() else None
    if detect(source) == "huggingface":
        huggingface.check_method(source)
    checkpoint = read(source, huggingface.load_config(directory) if directory else huggingface.load_config_file(file))
    return checkpoint.with_files(companions(directory)) if directory else checkpoint


def compare(checkpoint: Checkpoint, other: Checkpoint, progress: Progress = QUIET) -> None:
    """ValueError naming the first parameters that are not the same, bit by bit; of the vocabulary, only rows that stand for text count
    where one side is an .npz, which has no others."""
    text = big_vision.text_rows(checkpoint.config) if "big_vision" in (checkpoint.format, other.format) else None
    different = []
    for path, tensor in checkpoint.tensors.items():
        rows = (lambda t: with_rows(t, text)) if text and path == "decoder/embedder/table" else (lambda t: t)
        if not equal(rows(tensor), rows(other.tensors[path])):
            different.append(path)
        progress(tensor.nbytes)
    if different:
        raise ValueError(f"verification failed: {len(different)} tensors differ: {', '.join(different[:5])}")


def inspect(source: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """What a checkpoint is: format, variant, parameters, bytes, dtypes, resolution, numerics, files, and what is odd about it."""
    checkpoint = opened(Path(source).expanduser(), config)
    dtypes = Counter(tensor.dtype.name for tensor in checkpoint.tensors.values())
    notes = list(checkpoint.notes)
    if len({tensor.dtype for path, tensor in checkpoint.tensors.items() if path not in checkpoint.parts}) > 1:
        notes.append("its tensors have several dtypes")
    if variant(checkpoint.config) is None:
        notes.append("its shapes are those of no published PaliGemma")
    if huggingface.INDEX in checkpoint.files:
        total = json.loads(contents(checkpoint.files[huggingface.INDEX])).get("metadata", {}).get("total_size")
        if total is not None and total != checkpoint.nbytes:
            notes.append(f"its index says {total} bytes, its tensors have {checkpoint.nbytes}")
    if "tokenizer.model" not in checkpoint.files:
        notes.append("it has no tokenizer.model, without which text cannot be read or written")
    return {
        "format": checkpoint.format,
        "variant": variant(checkpoint.config) or "unknown",
        "decoder": checkpoint.config.decoder.model_type,
        "resolution": checkpoint.config.vision.image_size,
        "numerics": checkpoint.config.numerics,
        "parameters": sum(size(tensor) for tensor in dequantize_checkpoint(checkpoint).tensors.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(dtypes),
        **({"quantized": dict(Counter(map(str, checkpoint.formats.values())))} if checkpoint.formats else {}),
        "files": sorted(checkpoint.files),
        "odd": notes,
    }


def variant(config: PaliGemmaConfig) -> str | None:
    """The name of the preset with these sizes, whatever its resolution and numerics."""
    plain = with_resolution(replace(config, dtype="float32", numerics="transformers", eos_token_ids=(1,)), 224)
    name = next((name for name, preset in PRESETS.items() if with_resolution(preset, 224) == plain), None)
    return name and (f"{name.rpartition('-')[0]}-{config.vision.image_size}" if "-" in name else name)


def size(tensor: Tensor) -> int:
    """The number of numbers."""
    return tensor.nbytes // tensor.dtype.itemsize


def table(checkpoint: Checkpoint) -> list[tuple[str, str, str, int]]:
    """(parameter path, shape, dtype, bytes) of every tensor, for `--dry-run`."""
    return [(path, " x ".join(map(str, tensor.shape)), tensor.dtype.name, tensor.nbytes) for path, tensor in checkpoint.tensors.items()]
