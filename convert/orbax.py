"""This project's own checkpoints: weights that Orbax restores, and the rest in JSON.

    DIR/paligemma.json   version, config (as in config.json), generation, shards (of a Hugging Face
                         source), quantized: {"decoder/layers/0/mlp/down": "nf4-64", ...}
    DIR/params/          a tree of arrays, as `orbax.checkpoint.StandardCheckpointer` saves it;
                         quantized matrices as codes and scales (`paligemma_jax/model/codes.py`)
    DIR/huggingface/     config.json, tokenizer, processor, ... of the source

`write` streams each array, uncompressed, into a zarr directory of its own, as Orbax does with
`use_ocdbt=False`. (Orbax itself needs all arrays in memory, and spends time on compressing noise.)
`read` also reads what Orbax wrote.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from convert.checkpoint import Checkpoint
from convert.config import config_from_json, config_to_json
from convert.files import companion_files, copy_files, json_bytes
from convert.match import TensorEntry, Weight, match, weights
from convert.quantized import PART_DTYPES, quantized_weights
from convert.table import JAX
from convert.tensor import DTYPES, Index, Job, Progress, Tensor, map_file, no_progress, run_jobs
from convert.typed_json import Count, JsonObject, check, load_json
from convert.weight_files import check_names
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import WeightFormat

CONFIG, PARAMS, FILES = "paligemma.json", "params", "huggingface"
VERSION = 1
FILL = "store_array_data_equal_to_fill_value"  # if not set, a missing chunk is all zeros
# By their names in zarr and in tensorstore.
DTYPE_NAMES = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "uint8"}
DTYPE_NAMES |= {name: name for name in PART_DTYPES}


class _Version(msgspec.Struct):
    version: int = 0


class _Description(msgspec.Struct):
    """paligemma.json."""

    config: JsonObject
    generation: JsonObject
    shards: dict[str, list[str]] = {}
    quantized: dict[str, str] = {}


class _Key(msgspec.Struct):
    key: str | int


class _Value(msgspec.Struct):
    skip_deserialize: bool = False  # of None and of an empty node


class _Leaf(msgspec.Struct):
    key_metadata: list[_Key]
    value_metadata: _Value = msgspec.field(default_factory=_Value)


class _Tree(msgspec.Struct):
    """The metadata of a tree of arrays."""

    tree_metadata: dict[str, _Leaf]
    use_ocdbt: bool
    use_zarr3: bool = False
    filled: bool = msgspec.field(default=False, name=FILL)


class _Array(msgspec.Struct):
    """The metadata of an array that may be in one file."""

    dtype: str
    shape: list[Count]
    order: str


def read(directory: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """Read the checkpoint of a directory that `write` or `describe` made.

    Raises:
        ValueError: Lists everything that is wrong.
    """
    file, params = directory / CONFIG, directory / PARAMS
    version = load_json(file, _Version).version
    if version != VERSION:
        raise ValueError(f"{file} has version {version}; this release reads version {VERSION}")
    description = load_json(file, _Description)
    check_names(description.shards, f"{file}: shards")
    config = config or _parse_config(file, description)
    entries = {"/".join(keys): entry for keys, entry in open_tree(params).items()}
    weights, formats, dtypes = _parse_formats(file, description.quantized, config)
    tensors = match(entries, weights, dtypes=DTYPE_NAMES, source=params, config_name=CONFIG)
    for path, tensor in tensors.items():
        allowed = [dtypes[path]] if path in dtypes else list(DTYPES.values())
        if tensor.dtype not in allowed:
            required = f"{CONFIG} requires {' or '.join(dtype.name for dtype in allowed)}"
            raise ValueError(f"{params}: {path} has dtype {tensor.dtype}, but {required}")
    files = companion_files(directory / FILES) if (directory / FILES).is_dir() else {}
    checkpoint = Checkpoint("jax", config, tensors, files, description.shards, formats=formats)
    return replace(checkpoint, config=replace(config, dtype=checkpoint.largest_dtype))


def open_tree(params: Path) -> dict[tuple[str, ...], TensorEntry]:
    """Open the arrays of a tree that Orbax or `write` saved, by the keys that lead to them.

    Raises:
        ValueError: The tree is damaged or has another form.
    """
    tree = load_json(params / "_METADATA", _Tree)
    leaves = tree.tree_metadata.values()
    arrays = [leaf for leaf in leaves if not leaf.value_metadata.skip_deserialize]
    paths = [tuple(str(step.key) for step in leaf.key_metadata) for leaf in arrays]
    return {keys: _entry(params, ".".join(keys), tree) for keys in paths}


def write(directory: Path, checkpoint: Checkpoint, progress: Progress = no_progress) -> None:
    """Write params/, huggingface/ and, last, paligemma.json, which makes it a checkpoint."""
    params, jobs, tree = directory / PARAMS, [], {}
    params.mkdir(parents=True)
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    for path, tensor in checkpoint.tensors.items():
        keys, array = path.split("/"), params / path.replace("/", ".")
        array.mkdir()
        is_bfloat16 = tensor.dtype == DTYPES["bfloat16"]
        dtype = "bfloat16" if is_bfloat16 else tensor.dtype.str
        order = "F" if tensor.column_major else "C"
        (array / ".zarray").write_text(json.dumps(_zarray(tensor.shape, dtype, order)))
        jobs.append(Job(path, tensor, array / _chunk(tensor.shape), 0, tensor.column_major))
        steps = [{"key": key, "key_type": 2} for key in keys]
        tree[str(tuple(keys))] = {"key_metadata": steps, "value_metadata": value}
    run_jobs(jobs, progress)
    metadata = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, FILL: True}
    (params / "_METADATA").write_text(json.dumps(metadata))
    describe(directory, checkpoint)


def describe(directory: Path, checkpoint: Checkpoint) -> None:
    """Write everything but params/, for callers that save it with
    `StandardCheckpointer().save(directory / "params", tree)`."""
    (directory / FILES).mkdir(exist_ok=True)
    copy_files(directory / FILES, checkpoint.files)
    description = {
        "version": VERSION,
        "config": config_to_json(checkpoint.config, checkpoint.config.dtype),
        "generation": {"eos_token_id": list(checkpoint.config.eos_token_ids)},
        "shards": checkpoint.shards,
    }
    if checkpoint.formats:
        description["quantized"] = {path: str(f) for path, f in checkpoint.formats.items()}
    (directory / CONFIG).write_bytes(json_bytes(description))


def _parse_config(file: Path, description: _Description) -> PaliGemmaConfig:
    try:
        return config_from_json(description.config, description.generation)
    except ValueError as error:
        raise ValueError(f"{file} has an invalid config: {error}") from None


def _parse_formats(
    file: Path, names: dict[str, str], config: PaliGemmaConfig
) -> tuple[list[Weight], dict[str, WeightFormat], dict[str, np.dtype]]:
    """The weights of the checkpoint, the formats of its quantized matrices, and the dtypes of their
    parts."""
    dense = weights(JAX[config.decoder.model_type], config)
    if not names:
        return dense, {}, {}
    try:
        formats = {path: WeightFormat.parse(name) for path, name in names.items()}
        parts, dtypes = quantized_weights(dense, formats, config)
        return parts, formats, dtypes
    except ValueError as error:
        raise ValueError(f"{file} has an invalid list of quantized matrices: {error}") from None


def _entry(params: Path, name: str, tree: _Tree) -> TensorEntry:
    array = params / name
    if not tree.use_ocdbt and not tree.use_zarr3:
        zarr = load_json(array / ".zarray")
        metadata = check(zarr, _Array, str(array / ".zarray"))
        dtype, shape, order = metadata.dtype, tuple(metadata.shape), metadata.order
        is_one_file = zarr == _zarray(shape, dtype, order) and order in ("C", "F")
        if is_one_file and dtype in DTYPE_NAMES:
            file = array / _chunk(shape)
            return TensorEntry(dtype, shape, partial(_map_chunk, file, dtype, shape, order))
    store = _open_store(params, name, tree)
    dtype, shape = store.dtype.name, tuple(store.shape)

    def raw(index: Index) -> np.ndarray:
        return np.asarray((store[index] if index else store).read().result())

    return TensorEntry(dtype, shape, lambda: Tensor(shape, PART_DTYPES[dtype], raw))


def _map_chunk(file: Path, dtype: str, shape: tuple[int, ...], order: str) -> Tensor:
    tensor = map_file(file, 0, PART_DTYPES[DTYPE_NAMES[dtype]], shape, order)
    size = file.stat().st_size if file.is_file() else 0
    if size != tensor.nbytes:
        expected = f"shape {list(shape)} needs {tensor.nbytes}"
        raise ValueError(f"{file} has {size} bytes, but {expected}; it is truncated or misplaced")
    return tensor


def _open_store(params: Path, name: str, tree: _Tree):
    """Open an array in another of Orbax's forms (one database, compressed, in chunks) through
    tensorstore, which would abort the process for a chunk that does not fit the memory."""
    import tensorstore

    base = f"file://{params.absolute()}"
    in_database = {"driver": "ocdbt", "base": base, "path": name}
    spec = {
        "driver": "zarr3" if tree.use_zarr3 else "zarr",
        "kvstore": in_database if tree.use_ocdbt else f"{base}/{name}",
        "fill_missing_data_reads": not tree.filled,
    }
    try:
        store = tensorstore.open(spec, read=True).result()
    except ValueError as error:
        raise ValueError(f"{params}: cannot read {name}: {str(error)[:300]}") from None
    chunks = store.chunk_layout.write_chunk_template.shape
    if any(chunk > size for chunk, size in zip(chunks, store.shape, strict=True)):
        listed = f"{list(chunks)}, which exceed its shape {list(store.shape)}"
        raise ValueError(f"{params}: {name} has chunks of {listed}")
    return store


def _zarray(shape: tuple[int, ...], dtype: str, order: str) -> JsonObject:
    """The metadata of an array in one uncompressed file."""
    return {
        "zarr_format": 2,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
        "chunks": list(shape),
        "shape": list(shape),
        "dtype": dtype,
        "order": order,
    }


def _chunk(shape: tuple[int, ...]) -> str:
    """The name of the only chunk of an array."""
    return ".".join("0" * len(shape))
