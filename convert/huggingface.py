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
from convert.match import TensorEntry, file_shapes, huggingface_weights, match
from convert.safetensors import NAMES, load_header, make_header
from convert.table import HUGGINGFACE_IGNORED, HUGGINGFACE_SPELLINGS
from convert.tensor import Job, Progress, Tensor, equal, from_array, no_progress, run_jobs
from convert.typed_json import load_json
from paligemma_jax.model.config import PaliGemmaConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
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
    headers = {file: load_header(file) for file in _weight_files(directory)}
    entries: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for key in header.keys() & entries.keys():
            first = next(other.name for other, earlier in headers.items() if key in earlier)
            both = f"{first} and {file.name}"
            raise ValueError(f"{directory}: {key} is in both {both}; download them again")
        entries |= header
    files = companion_files(directory)
    entries, packed = bitsandbytes.unpack(entries, directory)
    weights = huggingface_weights(config)
    tensors = match(
        entries,
        weights,
        dtypes=NAMES,
        source=directory,
        config_name="config.json",
        canonical_name=canonical_name,
        ignored=HUGGINGFACE_IGNORED,
    )
    kept, notes = _check_unused(entries, file_shapes(weights), tensors["decoder/embedder/table"])
    shards = {
        file.name: [key for key in header if canonical_name(key) in kept]
        for file, header in headers.items()
    }
    packed = {canonical_name(key): matrix for key, matrix in packed.items()}
    formats = bitsandbytes.insert(tensors, weights, packed, config)
    checkpoint = Checkpoint("huggingface", config, tensors, files, shards, notes, formats)
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
    tensors = _file_tensors(checkpoint.config, checkpoint.tensors)
    tensors[HEAD] = tensors[TABLE]  # only written if the source had it
    sizes = {key: tensor.nbytes for key, (_, tensor) in tensors.items()}
    shards = checkpoint.shards
    if max_shard or not shards:
        shards = _split(checkpoint, sizes, max_shard or MAX_SHARD)
    jobs = []
    for name, keys in shards.items():
        contents = {key: tensors[canonical_name(key)] for key in keys}
        jobs += _start_file(directory / name, contents)
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
    run_jobs(_start_file(directory / SINGLE, _file_tensors(config, tensors)), no_progress)
    dtype = next(iter(tensors.values())).dtype.name
    (directory / "config.json").write_bytes(json_bytes(config_to_json(config, dtype)))


def canonical_name(key: str) -> str:
    """The released name of a tensor, from its name in any release of transformers."""
    for pattern, replacement in HUGGINGFACE_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
        return [directory / SINGLE]
    shards = load_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted({str(name) for name in shards.values()})
    outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if outside:  # "../x.safetensors" must not be opened
        listed = ", ".join(map(repr, outside))
        raise ValueError(f"{index} must name .safetensors files of its own directory, got {listed}")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        listed = f"{', '.join(missing)} (listed in {INDEX})"
        raise ValueError(f"{directory}: {listed} is missing; download it again")
    return [directory / name for name in names]


def _check_unused(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], table: Tensor
) -> tuple[set[str], tuple[str, ...]]:
    """The released names of the tensors that are used, and notes about the others."""
    used, notes = set(shapes), []
    head = next((entry for key, entry in entries.items() if canonical_name(key) == HEAD), None)
    if head and head.dtype in NAMES and equal(head.open(), table):
        used.add(HEAD)
    elif head:
        notes.append("lm_head differs from the embedding table to which it is tied; it is ignored")
    unused = [key for key in entries if canonical_name(key) not in used]
    if unused:
        listed = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        notes.append(f"{len(unused)} tensors that PaliGemma does not use are ignored: {listed}")
    return used, tuple(notes)


def _file_tensors(
    config: PaliGemmaConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Parameter path and tensor by released name, in the file's layout."""
    return {
        weight.key: (weight.path, weight.to_file(tensors[weight.path]))
        for weight in huggingface_weights(config)
    }


def _start_file(file: Path, contents: Mapping[str, tuple[str, Tensor]]) -> list[Job]:
    """Write the header of a safetensors file; returns the jobs that write its tensors."""
    kinds = {key: (tensor.dtype, tensor.shape) for key, (_, tensor) in contents.items()}
    header, offsets = make_header(kinds)
    file.write_bytes(header)
    return [Job(path, tensor, file, offsets[key]) for key, (path, tensor) in contents.items()]


def _split(checkpoint: Checkpoint, sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Split the tensors into files of at most `limit` bytes each, unless a single tensor is larger.
    Order and names are those of the source, if it had any."""
    keys = [key for shard in checkpoint.shards.values() for key in shard]
    keys = keys or sorted(sizes.keys() - {HEAD}, key=_natural_order)
    shards: list[list[str]] = [[]]
    used = 0
    for key in keys:
        size = sizes[canonical_name(key)]
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
    size = sum(sizes[canonical_name(key)] for keys in shards.values() for key in keys)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    new = {"metadata": (old.get("metadata") or {}) | {"total_size": size}, "weight_map": weight_map}
    if new == old:
        return {INDEX: checkpoint.files[INDEX]}
    return {INDEX: json_bytes(new, sort_keys=True)} if len(shards) > 1 else {}


def _config_json(checkpoint: Checkpoint) -> FileContent:
    """The source's config.json, with the numerics added, if it is still valid; or a new one."""
    config, files = checkpoint.config, checkpoint.files
    try:
        old = parse_json(files["config.json"])
        generation = files.get("generation_config.json")
        generation = None if generation is None else parse_json(generation)
        unrelated = ("numerics", "quantization_config")  # tensors are written unquantized
        new = {key: value for key, value in old.items() if key not in unrelated}
        if config.numerics != "transformers":
            new["numerics"] = config.numerics
        if replace(config_from_json(new, generation), dtype=config.dtype) == config:
            return files["config.json"] if new == old else json_bytes(new)
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    return json_bytes(config_to_json(config, config.dtype))
