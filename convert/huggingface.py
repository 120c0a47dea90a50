"""Hugging Face directories, in and out: config.json, safetensors in every spelling of the names, and the files that come along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import bitsandbytes
from convert.checkpoint import Checkpoint, contents
from convert.config import read_config, write_config
from convert.files import companions, json_bytes, read_json, write_files, write_json
from convert.match import Entry, match, pieces, shapes
from convert.safetensors import NAMES, make_header, read_header
from convert.table import HUGGINGFACE, HUGGINGFACE_IGNORED, HUGGINGFACE_SPELLINGS
from convert.tensor import Job, Progress, equal, from_array, write_tensors
from paligemma_jax.model.config import PaliGemmaConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
MAX_SHARD = 5 * 10**9  # bytes; what transformers 4 takes by default


def load_config(directory: Path) -> PaliGemmaConfig:
    """Read the config of a Hugging Face directory. ValueError if there is none, if it is another
    model's, or if the weights are quantized by a method that cannot be read."""
    file = directory / "config.json"
    content = read_json(file)
    config = _parse_config(file, content)
    _check_method(directory, content)
    return config


def load_config_file(file: Path) -> PaliGemmaConfig:
    """The config of a config.json, and of the generation_config.json beside it if there is one (for the ids that end an answer)."""
    return _parse_config(file, read_json(file))


def _parse_config(file: Path, config: dict[str, Any]) -> PaliGemmaConfig:
    generation = file.with_name("generation_config.json")
    try:
        return read_config(config, read_json(generation) if generation.exists() else None)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is malformed: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}") from None


def read(directory: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """The checkpoint of a directory, with `config` in the place of its config.json's if given.

    All keys and shapes are checked against the table before a tensor is read; one ValueError tells all that is wrong.
    """
    config = config or load_config(directory)  # a given config was checked by whoever read it
    headers = {file: read_header(file) for file in _files(directory)}
    entries: dict[str, Entry] = {}
    for file, header in headers.items():
        for key in header.keys() & entries.keys():
            first = next(other.name for other, there in headers.items() if key in there)
            raise ValueError(f"{directory}: {key} is in {first} and in {file.name}; download them again")
        entries |= header
    found, files = pieces(HUGGINGFACE[config.decoder.model_type], config), companions(directory)
    entries, packed = bitsandbytes.unpack(entries, directory)
    tensors = match(entries, found, NAMES, directory, "config.json", canonical_name, HUGGINGFACE_IGNORED)
    kept, notes = set(shapes(found)), []
    if head := next((entry for key, entry in entries.items() if canonical_name(key) == HEAD), None):
        if head.dtype in NAMES and equal(head.tensor(), tensors["decoder/embedder/table"]):
            kept.add(HEAD)
        else:
            notes.append("its lm_head differs from the embedding table, to which it is tied: the table is taken for both")
    if dropped := [key for key in entries if canonical_name(key) not in kept]:
        notes.append(f"{len(dropped)} tensors that no PaliGemma uses are left out: {', '.join(dropped[:3])}{', ...' * (len(dropped) > 3)}")
    shards = {file.name: [key for key in header if canonical_name(key) in kept] for file, header in headers.items()}
    formats = bitsandbytes.put(tensors, found, {canonical_name(key): one for key, one in packed.items()}, config)
    checkpoint = Checkpoint("huggingface", config, tensors, files, shards, tuple(notes), formats)
    largest = max((tensor for path, tensor in tensors.items() if path not in checkpoint.parts), key=lambda tensor: tensor.nbytes)
    return replace(checkpoint, config=replace(config, dtype=largest.dtype.name))


def write(directory: Path, checkpoint: Checkpoint, progress: Progress = lambda n: None, max_shard: int | None = None) -> None:
    """Writes a directory that transformers 4 and 5 load.

    A checkpoint that came from Hugging Face gets the same files, names and index again, unless `max_shard` (bytes) cuts it anew;
    config.json comes along verbatim if it still says what the config is, and is made from it otherwise.
    """
    directory.mkdir()
    found = pieces(HUGGINGFACE[checkpoint.config.decoder.model_type], checkpoint.config)
    named = {piece.key: (piece.path, piece.there(checkpoint.tensors[piece.path])) for piece in found}
    named[HEAD] = named[TABLE]  # only written where the source had it
    sizes = {key: tensor.nbytes for key, (_, tensor) in named.items()}
    shards = checkpoint.shards if checkpoint.shards and not max_shard else _cut(checkpoint, sizes, max_shard or MAX_SHARD)
    jobs = []
    for name, keys in shards.items():
        parts = {key: named[canonical_name(key)] for key in keys}
        head, offsets = make_header({key: (tensor.dtype, tensor.shape) for key, (_, tensor) in parts.items()})
        (directory / name).write_bytes(head)
        jobs += [Job(path, tensor, directory / name, offsets[key]) for key, (path, tensor) in parts.items()]
    write_tensors(jobs, progress)
    write_files(directory, {name: file for name, file in checkpoint.files.items() if name not in (INDEX, "config.json")})
    if len(shards) > 1 or INDEX in checkpoint.files:
        _write_index(directory, checkpoint, shards, sum(sizes[canonical_name(key)] for keys in shards.values() for key in keys))
    if "generation_config.json" not in checkpoint.files and len(checkpoint.config.eos_token_ids) > 1:
        write_json(directory / "generation_config.json", {"eos_token_id": list(checkpoint.config.eos_token_ids)})
    write_files(directory, {"config.json": _config_json(checkpoint)})


def save(directory: Path, config: PaliGemmaConfig, parameters: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors and config.json from parameters by path, beside what else is in the directory; their dtype is the file's."""
    tensors = {path: from_array(array) for path, array in parameters.items()}
    found = pieces(HUGGINGFACE[config.decoder.model_type], config)
    parts = {piece.key: (piece.path, piece.there(tensors[piece.path])) for piece in found}
    head, offsets = make_header({key: (tensor.dtype, tensor.shape) for key, (_, tensor) in parts.items()})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SINGLE).write_bytes(head)
    write_tensors([Job(path, tensor, directory / SINGLE, offsets[key]) for key, (path, tensor) in parts.items()], lambda n: None)
    write_json(directory / "config.json", write_config(config, next(iter(tensors.values())).dtype.name))


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name in the released spelling -> shape of every tensor of a checkpoint."""
    return shapes(pieces(HUGGINGFACE[config.decoder.model_type], config))


def check_method(directory: Path) -> None:
    """ValueError if the config.json of a directory, if any, names an unknown quantization method."""
    file = directory / "config.json"
    if file.exists():
        _check_method(directory, read_json(file))


def _check_method(directory: Path, config: Mapping[str, Any]) -> None:
    about = config.get("quantization_config")
    if about and (method := about.get("quant_method") if isinstance(about, dict) else about) != "bitsandbytes":
        raise ValueError(
            f"{directory} is quantized by {method!r}; what bitsandbytes quantized, to nf4 or int8, can be read, and any that is not quantized"
        )


def canonical_name(key: str) -> str:
    """The released spelling of a key of any transformers release."""
    for pattern, replacement in HUGGINGFACE_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
        return [directory / SINGLE]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted({str(name) for name in shards.values()})
    if strange := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:  # "../x.safetensors" must not be opened
        raise ValueError(f"{index} names {', '.join(map(repr, strange))}, not a .safetensors file of its own directory")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise ValueError(f"{directory}: {', '.join(missing)}, named in {INDEX}, is missing; download it again")
    return [directory / name for name in names]


def _cut(checkpoint: Checkpoint, sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """file -> keys, each file at most `limit` bytes unless a single tensor has more; in the source's order and spelling if it had one."""
    keys = [key for shard in checkpoint.shards.values() for key in shard] or sorted((key for key in sizes if key != HEAD), key=_natural)
    shards: list[list[str]] = [[]]
    for key in keys:
        if shards[-1] and sum(sizes[canonical_name(other)] for other in shards[-1]) + sizes[canonical_name(key)] > limit:
            shards.append([])
        shards[-1].append(key)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _natural(key: str) -> list:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _write_index(directory: Path, checkpoint: Checkpoint, shards: Mapping[str, list[str]], nbytes: int) -> None:
    old = json.loads(contents(checkpoint.files[INDEX])) if INDEX in checkpoint.files else {}
    metadata = (old.get("metadata") or {}) | {"total_size": nbytes}
    new = {"metadata": metadata, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    if new == old:
        write_files(directory, {INDEX: checkpoint.files[INDEX]})
    elif len(shards) > 1:
        write_json(directory / INDEX, new, sort_keys=True)


def _config_json(checkpoint: Checkpoint) -> Path | bytes:
    """The config.json that came along, if it says what the config is (but for the numerics, which are added), or else a new one."""
    config, files = checkpoint.config, checkpoint.files
    try:
        old, generation = (json.loads(contents(files.get(name, b"null"))) for name in ("config.json", "generation_config.json"))
        new = {key: value for key, value in old.items() if key != "numerics"}
        new.pop("quantization_config", None)  # what it says is quantized is whole here
        new |= {} if config.numerics == "transformers" else {"numerics": config.numerics}
        if replace(read_config(new, generation), dtype=config.dtype) == config:
            return files["config.json"] if new == old else json_bytes(new)
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    return json_bytes(write_config(config, config.dtype))
