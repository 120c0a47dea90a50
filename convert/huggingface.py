"""Safetensors in Hugging Face layout, in and out; one tensor at a time, never through torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.config import read_config, write_config
from convert.layout import axis_sizes, reorder, shape
from convert.table import HUGGINGFACE, HUGGINGFACE_IGNORED, HUGGINGFACE_SPELLINGS
from paligemma_jax.model.config import PaliGemmaConfig

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Source:
    """One tensor of the files and the parameter that it fills."""

    file: Path
    key: str  # as spelled in the file
    layout: str
    path: str
    target: str


def load_config(directory: Path) -> PaliGemmaConfig:
    """The config of a Hugging Face directory; ValueError if there is none or it is another model's."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    try:
        return read_config(config, read_json(generation) if generation.exists() else None)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{directory / 'config.json'} is malformed: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def load_tensors(directory: Path, config: PaliGemmaConfig, paths: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(parameter path, array in this project's layout and the file's dtype) for every one of `paths`, in the order of the files.

    Before the first tensor is read, all keys and shapes are checked against the table; one ValueError tells all that is wrong.
    """
    sources = plan(directory, config, paths)
    for file in dict.fromkeys(source.file for source in sources):
        with _open(file) as tensors:
            for source in sources:
                if source.file == file:
                    yield source.path, reorder(_read(tensors, file, source.key), source.layout, source.target, axis_sizes(config, source.path))


def plan(directory: Path, config: PaliGemmaConfig, paths: dict[str, Any]) -> list[Source]:
    """Which tensor of which file fills which parameter. ValueError listing every missing, unknown and mis-shaped key."""
    rows = [(_pattern(name), layout, path, target) for name, layout, path, target in HUGGINGFACE[config.decoder.model_type]]
    sources: dict[str, Source] = {}
    wrong: list[str] = []
    for key, (file, dtype, found) in _headers(directory).items():
        name = canonical(key)
        row = next(((m, *row[1:]) for row in rows if (m := row[0].fullmatch(name))), None)
        path = row and row[2].replace("*", row[0].group(1) if row[0].groups() else "")
        if row is None or path not in paths:
            if not any(re.fullmatch(pattern, name) for pattern in HUGGINGFACE_IGNORED):
                wrong.append(f"unknown key {key}")
            continue
        expected = shape(row[1], axis_sizes(config, path))
        if found != expected:
            wrong.append(f"{key} has shape {list(found)}, config.json asks for {list(expected)}")
        if dtype not in DTYPES:
            wrong.append(f"{key} has dtype {dtype}; known are {', '.join(DTYPES)}")
        if path in sources:
            wrong.append(f"{key} and {sources[path].key} are the same tensor")
        sources[path] = Source(file, key, row[1], path, row[3])
    wrong += [f"missing {_name(path, config)}" for path in paths if path not in sources]
    if wrong:
        raise ValueError(f"{directory} does not hold the weights that its config.json describes ({len(wrong)} faults):\n  " + "\n  ".join(wrong))
    return list(sources.values())


def save(directory: Path, config: PaliGemmaConfig, parameters: dict[str, np.ndarray]) -> None:
    """Writes model.safetensors and config.json from parameters by path; the file's dtype is theirs."""
    tensors = {}
    for name, layout, path, source in HUGGINGFACE[config.decoder.model_type]:
        for layer in range(10**6):
            here = path.replace("*", str(layer))
            if here not in parameters:
                break
            array = reorder(np.asarray(parameters[here]), source, layout, axis_sizes(config, here))
            tensors[name.replace("*", str(layer))] = np.ascontiguousarray(array)
            if here == path:
                break
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    dtype = next(iter(tensors.values())).dtype.name
    (directory / "config.json").write_text(json.dumps(write_config(config, dtype), indent=2) + "\n")


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name in the released spelling -> shape of every tensor of a checkpoint."""
    depth = {"vision": config.vision.num_hidden_layers, "decoder": config.decoder.num_hidden_layers}
    return {
        name.replace("*", str(layer)): shape(layout, axis_sizes(config, path))
        for name, layout, path, _ in HUGGINGFACE[config.decoder.model_type]
        for layer in range(depth[path.split("/")[0]] if "*" in path else 1)
    }


def checkpoint_dtype(directory: Path) -> str:
    """The dtype of the weights: that of the largest tensor."""
    tensors = _headers(directory).values()
    return DTYPES.get(max(tensors, key=lambda entry: np.prod(entry[2]))[1], "float32") if tensors else "float32"


def canonical(key: str) -> str:
    """The released spelling of a key of any transformers release."""
    for pattern, replacement in HUGGINGFACE_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}: it is not a Hugging Face checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of 5,000 digits
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def _headers(directory: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """key -> (file, dtype, shape) over all files of a directory, without reading a tensor."""
    found = {}
    for file in _files(directory):
        with _open(file) as tensors:
            for key in tensors.keys():
                if key in found:
                    raise ValueError(f"{directory}: {key} is in {found[key][0].name} and in {file.name}; download them again")
                piece = tensors.get_slice(key)
                found[key] = (file, piece.get_dtype(), tuple(piece.get_shape()))
    return found


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if not (directory / "model.safetensors").exists():
            raise ValueError(f"{directory} has neither model.safetensors nor {INDEX}")
        return [directory / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted({str(name) for name in shards.values()})
    if strange := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:  # "../x.safetensors" must not be opened
        raise ValueError(f"{index} names {', '.join(map(repr, strange))}, not a .safetensors file of its own directory")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise ValueError(f"{directory}: {', '.join(missing)}, named in {INDEX}, is missing; download it again")
    return [directory / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}); download it again") from None


def _read(tensors: Any, file: Path, key: str) -> np.ndarray:
    try:
        return tensors.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot read {key} ({error}); download it again") from None


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)"))


def _name(path: str, config: PaliGemmaConfig) -> str:
    """The name in the file of the parameter at `path`."""
    for name, _, pattern, _ in HUGGINGFACE[config.decoder.model_type]:
        if match := _pattern(pattern).fullmatch(path):
            return name.replace("*", match.group(1) if match.groups() else "")
    return path
