"""This project's own checkpoints, in and out: weights that Orbax restores, config and numerics in paligemma.json, other files beside.

    DIR/paligemma.json     {"version", "config" (as in config.json), "generation", "shards" (of a Hugging Face source),
                            "quantized": {"decoder/layers/0/mlp/down": "nf4-64", ...}}
    DIR/params/            what `orbax.checkpoint.StandardCheckpointer` saves and restores: a tree of arrays; of a quantized matrix
                           codes and scales (`paligemma_jax/model/codes.py`) in the place of the kernel
    DIR/huggingface/       config.json, tokenizer, processor, ... as they came along

`write` streams: it puts every array, uncompressed and whole, into a zarr directory of its own, as Orbax does with `use_ocdbt=False`.
(Orbax itself wants all arrays in memory, and compresses bfloat16 noise for nothing.) `read` also reads what Orbax wrote.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.config import read_config, write_config
from convert.files import companions, read_json, write_files, write_json
from convert.match import Entry, Piece, match, pieces
from convert.quantized import in_parts
from convert.table import JAX
from convert.tensor import DTYPES, INTEGERS, Job, Progress, Tensor, stored, write_tensors
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import WeightFormat

CONFIG, PARAMS, FILES = "paligemma.json", "params", "huggingface"
VERSION = 1
FILLED = "store_array_data_equal_to_fill_value"  # is a chunk that is not there a fault, or all zeros?
STORED = DTYPES | INTEGERS
DTYPE_NAMES = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "uint8"} | {name: name for name in STORED}  # zarr's, and tensorstore's


def read(directory: Path, config: PaliGemmaConfig | None = None) -> Checkpoint:
    """The checkpoint of a directory that `write` or `describe` made. ValueError telling all that is wrong with it."""
    described = read_json(directory / CONFIG)
    if described.get("version") != VERSION:
        raise ValueError(f"{directory / CONFIG} is of version {described.get('version')!r}; this release reads version {VERSION}")
    config = config or _config(directory / CONFIG, described)
    params, tree = directory / PARAMS, read_json(directory / PARAMS / "_METADATA")
    try:
        keys = ["/".join(str(step["key"]) for step in leaf["key_metadata"]) for leaf in tree["tree_metadata"].values()]
        entries = {key: _entry(params, key, tree) for key in keys}
        shards = {str(name): [str(key) for key in keys] for name, keys in described.get("shards", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{params} is not an Orbax checkpoint, or a damaged one ({error!r})") from None
    found, formats, dtypes = _parts(directory / CONFIG, described.get("quantized", {}), config)
    tensors = match(entries, found, DTYPE_NAMES, params, CONFIG)
    for path, tensor in tensors.items():
        if tensor.dtype.name not in ([dtypes[path]] if path in dtypes else DTYPES):
            raise ValueError(f"{params}: {path} has dtype {tensor.dtype}, {CONFIG} asks for {dtypes.get(path, 'one of ' + ', '.join(DTYPES))}")
    largest = max((tensor for path, tensor in tensors.items() if path not in dtypes), key=lambda tensor: tensor.nbytes)
    files = companions(directory / FILES) if (directory / FILES).is_dir() else {}
    return Checkpoint("jax", replace(config, dtype=largest.dtype.name), tensors, files, shards, formats=formats)


def _parts(file: Path, named: Any, config: PaliGemmaConfig) -> tuple[list[Piece], dict[str, WeightFormat], dict[str, str]]:
    """The pieces to look for, the formats that paligemma.json names, and the dtypes of their parts."""
    found = pieces(JAX[config.decoder.model_type], config)
    if not named:
        return found, {}, {}
    try:
        formats = {str(where): WeightFormat.parse(str(name)) for where, name in named.items()}
        found, dtypes = in_parts(found, formats, config)
        return found, formats, dtypes
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} has no sound list of what is quantized: {error}") from None


def write(directory: Path, checkpoint: Checkpoint, progress: Progress = lambda n: None) -> None:
    """Writes paligemma.json, params/ and huggingface/; paligemma.json, without which it is no checkpoint, comes last."""
    directory.mkdir()
    params, jobs = directory / PARAMS, []
    params.mkdir()
    for path, tensor in checkpoint.tensors.items():
        array = params / path.replace("/", ".")
        array.mkdir()
        (array / ".zarray").write_text(json.dumps(_zarray(tensor.shape, _zarr_dtype(tensor.dtype), "F" if tensor.columns else "C")))
        jobs.append(Job(path, tensor, array / _chunk(tensor.shape), 0, tensor.columns))
    write_tensors(jobs, progress)
    step = lambda key: {"key": key, "key_type": 2}
    leaf = {"value_type": "jax.Array", "skip_deserialize": False}
    tree = {str(tuple(path.split("/"))): {"key_metadata": [step(k) for k in path.split("/")], "value_metadata": leaf} for path in checkpoint.tensors}
    (params / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, FILLED: True}))
    describe(directory, checkpoint)


def describe(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes all but params/: for those who save that themselves, `StandardCheckpointer().save(directory / "params", tree)`."""
    (directory / FILES).mkdir(exist_ok=True)
    write_files(directory / FILES, checkpoint.files)
    config, generation = write_config(checkpoint.config, checkpoint.config.dtype), {"eos_token_id": list(checkpoint.config.eos_token_ids)}
    described = {"version": VERSION, "config": config, "generation": generation, "shards": checkpoint.shards}
    described |= {"quantized": {where: str(format) for where, format in checkpoint.formats.items()}} if checkpoint.formats else {}
    write_json(directory / CONFIG, described)


def _config(file: Path, described: dict[str, Any]) -> PaliGemmaConfig:
    try:
        return read_config(described["config"], described["generation"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} has no sound config: {error}") from None


def _entry(params: Path, key: str, tree: dict[str, Any]) -> Entry:
    array = params / key.replace("/", ".")
    if not tree["use_ocdbt"] and not tree.get("use_zarr3"):
        zarr = read_json(array / ".zarray")
        dtype, shape = zarr["dtype"], tuple(zarr["shape"])
        if zarr == _zarray(shape, dtype, zarr["order"]) and dtype in DTYPE_NAMES and zarr["order"] in ("C", "F"):
            return Entry(dtype, shape, lambda: _whole(array / _chunk(shape), STORED[DTYPE_NAMES[dtype]], shape, zarr["order"]))
    store = _open(params, key, tree)
    dtype = store.dtype.name
    raw = lambda index: np.asarray(store[index].read().result() if index else store.read().result())
    return Entry(dtype, tuple(store.shape), lambda: Tensor(tuple(store.shape), STORED[dtype], raw))


def _whole(file: Path, dtype: np.dtype, shape: tuple[int, ...], order: str) -> Tensor:
    tensor = stored(file, 0, dtype, shape, order)
    size = file.stat().st_size if file.is_file() else 0
    if size != tensor.nbytes:
        raise ValueError(f"{file} has {size} bytes, {tensor.nbytes} make its shape {list(shape)}; it is truncated or of another checkpoint")
    return tensor


def _open(params: Path, key: str, tree: dict[str, Any]) -> Any:
    """What Orbax wrote in its other forms (one database for all, compressed, in chunks), through tensorstore."""
    import tensorstore

    driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    name = key.replace("/", ".")
    store = {"driver": "ocdbt", "base": f"file://{params.absolute()}", "path": name} if tree["use_ocdbt"] else f"file://{params.absolute()}/{name}"
    try:
        return tensorstore.open({"driver": driver, "kvstore": store, "fill_missing_data_reads": not tree.get(FILLED)}, read=True).result()
    except ValueError as error:
        raise ValueError(f"{params}: cannot read {key}: {error}") from None


def _zarray(shape: tuple[int, ...], dtype: str, order: str) -> dict[str, Any]:
    """The metadata of an array that is one uncompressed file."""
    one = {"zarr_format": 2, "compressor": None, "filters": None, "fill_value": None, "dimension_separator": "."}
    return one | {"chunks": list(shape), "shape": list(shape), "dtype": dtype, "order": order}


def _chunk(shape: tuple[int, ...]) -> str:
    return ".".join("0" * len(shape))


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == DTYPES["bfloat16"] else dtype.str
