"""Hugging Face directories: config.json, safetensors under the names of any release of
transformers, and the files beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert import bitsandbytes
from convert.checkpoint import Checkpoint
from convert.config import config_from_json, config_to_json, load_config
from convert.files import FileContent, companion_files, copy_files, json_bytes, parse_json
from convert.layout import axis_sizes, layout_shape
from convert.match import TensorEntry, file_shapes, huggingface_weights, match
from convert.safetensors import NAMES, make_header
from convert.table import HEAD, HUGGINGFACE_IGNORED, HUGGINGFACE_SPELLINGS, TABLE
from convert.tensor import Job, Progress, Tensor, equal, from_array, no_progress, relayout, run_jobs
from convert.weight_files import INDEX, SINGLE, load_headers
from paligemma_jax.model.config import PaliGemmaConfig

PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"
TORCH_PATCH, MLX_PATCH = "W C h w", "W h w C"
MAX_SHARD = 5 * 10**9  # bytes; the default of transformers 4


def read(directory: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """Read the checkpoint of a directory.

    Args:
        directory: Contains config.json and safetensors files.
        config: Used in place of config.json, which is then not read.

    Raises:
        ValueError: Lists everything that is wrong with the names, shapes and dtypes of the tensors,
            before any tensor is read.
    """
    config = config or load_config(directory)
    headers, files = load_headers(directory), companion_files(directory)
    entries = {key: entry for header in headers.values() for key, entry in header.items()}
    entries, packed = bitsandbytes.unpack(entries, directory)
    names, config, notes = _resolve_head(entries, config)
    if SINGLE in headers and files.pop(INDEX, None):
        notes.append(f"{INDEX} is ignored, since {SINGLE} exists (as in transformers)")
    mlx = [key for key, name in names.items() if name == PATCH and _is_mlx(entries[key], config)]
    if mlx:
        entries |= {key: _from_mlx(entries[key], config) for key in mlx}
        notes.append("its patch embedding is in the layout of MLX")
    weights = huggingface_weights(config)
    tensors = match(
        entries,
        weights,
        dtypes=NAMES,
        source=directory,
        config_name="config.json",
        canonical_name=names.__getitem__,
        ignored=HUGGINGFACE_IGNORED,
    )
    used = file_shapes(weights).keys() | {HEAD}
    unused = [key for key, name in names.items() if name not in used]
    if unused:
        listed = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        notes.append(f"{len(unused)} tensors that PaliGemma does not use are ignored: {listed}")
    shards = {
        file: [key for key in header if canonical_name(key) in used]
        for file, header in headers.items()
    }
    packed = {names[key]: matrix for key, matrix in packed.items()}
    formats = bitsandbytes.insert(tensors, weights, packed, config)
    checkpoint = Checkpoint("huggingface", config, tensors, files, shards, tuple(notes), formats)
    return replace(checkpoint, config=replace(config, dtype=checkpoint.largest_dtype))


def write(
    directory: Path,
    checkpoint: Checkpoint,
    progress: Progress = no_progress,
    max_shard: int | None = None,
) -> None:
    """Write a directory that transformers 4 and 5 load.

    A checkpoint that came from Hugging Face gets the same files, names and index again, unless
    `max_shard` (bytes) splits it differently. Its config.json is copied if it still describes the
    config; otherwise a new one is written.
    """
    directory.mkdir()
    tensors = file_tensors(checkpoint.config, checkpoint.tensors)
    keys = [key for shard in checkpoint.shards.values() for key in shard]
    keys = keys or sorted(tensors, key=_natural_order)
    tensors.setdefault(HEAD, tensors[TABLE])  # a tied head, written if the source had it
    sizes = {key: tensors[canonical_name(key)][1].nbytes for key in keys}
    shards = checkpoint.shards
    if max_shard or not shards:
        shards = _split(sizes, max_shard or MAX_SHARD)
    jobs = []
    for name, keys in shards.items():
        contents = {key: tensors[canonical_name(key)] for key in keys}
        jobs += start_file(directory / name, contents)
    run_jobs(jobs, progress)
    files = {n: file for n, file in checkpoint.files.items() if n not in (INDEX, "config.json")}
    eos = list(checkpoint.config.eos_token_ids)
    if "generation_config.json" not in files and len(eos) > 1:
        files["generation_config.json"] = json_bytes({"eos_token_id": eos})
    if len(shards) > 1 or INDEX in checkpoint.files:
        files |= _index(checkpoint, shards, sizes)
    copy_files(directory, files | {"config.json": _config_json(checkpoint)})


def save_parameters(
    directory: Path, config: PaliGemmaConfig, parameters: Mapping[str, np.ndarray]
) -> None:
    """Save parameters by path as model.safetensors and config.json, in their own dtype."""
    tensors = {path: from_array(array) for path, array in parameters.items()}
    directory.mkdir(parents=True, exist_ok=True)
    run_jobs(start_file(directory / SINGLE, file_tensors(config, tensors)), no_progress)
    dtype = next(iter(tensors.values())).dtype.name
    (directory / "config.json").write_bytes(json_bytes(config_to_json(config, dtype)))


def canonical_name(key: str) -> str:
    """The released name of a tensor, from its name in any release of transformers."""
    for pattern, replacement in HUGGINGFACE_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def _resolve_head(
    entries: Mapping[str, TensorEntry], config: PaliGemmaConfig
) -> tuple[dict[str, str], PaliGemmaConfig, list[str]]:
    """The released name of each tensor, the config, and notes about the head.

    As in transformers: a head that should be tied but differs from the table is not tied, and a
    tied head that is saved without the table is the table.
    """
    names = {key: canonical_name(key) for key in entries}
    keys = {name: key for key, name in names.items()}
    table, head = keys.get(TABLE), keys.get(HEAD)
    if head is None or not config.decoder.tie_word_embeddings:
        return names, config, []
    if table is None:
        return names | {head: TABLE}, config, []
    if entries[head].dtype not in NAMES or equal(entries[head].open(), entries[table].open()):
        return names, config, []
    untied = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
    note = "lm_head differs from the embedding table, so the two are not tied (as in transformers)"
    return names, untied, [note]


def _is_mlx(entry: TensorEntry, config: PaliGemmaConfig) -> bool:
    """Whether the kernel of the patch embedding has the axes of MLX, with the channels last."""
    return entry.shape == layout_shape(MLX_PATCH, axis_sizes(config, PATCH)) and entry.shape[1] != 3


def _from_mlx(entry: TensorEntry, config: PaliGemmaConfig) -> TensorEntry:
    """The kernel with the axes of torch."""
    sizes = axis_sizes(config, PATCH)

    def open_transposed() -> Tensor:
        return relayout(entry.open(), MLX_PATCH, TORCH_PATCH, sizes)

    return TensorEntry(entry.dtype, layout_shape(TORCH_PATCH, sizes), open_transposed)


def file_tensors(
    config: PaliGemmaConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Parameter path and tensor by released name, in the file's layout."""
    return {
        weight.key: (weight.path, weight.to_file(tensors[weight.path]))
        for weight in huggingface_weights(config)
    }


def start_file(file: Path, contents: Mapping[str, tuple[str, Tensor]]) -> list[Job]:
    """Write the header of a safetensors file; returns the jobs that write its tensors."""
    kinds = {key: (tensor.dtype, tensor.shape) for key, (_, tensor) in contents.items()}
    header, offsets = make_header(kinds)
    file.write_bytes(header)
    return [Job(path, tensor, file, offsets[key]) for key, (path, tensor) in contents.items()]


def _split(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Split tensors of these sizes into files of at most `limit` bytes each, unless a single tensor
    is larger. Order and names do not change."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = f"{len(shards):05}"
    return {f"model-{i:05}-of-{count}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _natural_order(key: str) -> list[int | str]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _index(
    checkpoint: Checkpoint, shards: Mapping[str, list[str]], sizes: Mapping[str, int]
) -> dict[str, FileContent]:
    """The index of the shards: the source's own if it is still valid. Empty for a single file."""
    old = parse_json(checkpoint.files.get(INDEX, b"{}"))
    size = sum(sizes.values())
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    new = {"metadata": (old.get("metadata") or {}) | {"total_size": size}, "weight_map": weight_map}
    if new == old:
        return {INDEX: checkpoint.files[INDEX]}
    return {INDEX: json_bytes(new, sort_keys=True)} if len(shards) > 1 else {}


def _config_json(checkpoint: Checkpoint) -> FileContent:
    """The source's config.json, with the numerics added, if it is still valid; or a new one."""
    config, files = checkpoint.config, checkpoint.files
    if "config.json" in files:
        old = parse_json(files["config.json"])
        generation = parse_json(files.get("generation_config.json", b"{}"))
        unrelated = ("numerics", "quantization_config")  # tensors are written unquantized
        new = {key: value for key, value in old.items() if key not in unrelated}
        if config.numerics != "transformers":
            new["numerics"] = config.numerics
        try:
            if replace(config_from_json(new, generation), dtype=config.dtype) == config:
                return files["config.json"] if new == old else json_bytes(new)
        except ValueError:  # such as that of another model
            pass
    return json_bytes(config_to_json(config, config.dtype))
