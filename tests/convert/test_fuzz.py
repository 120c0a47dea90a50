"""Damaged inputs: every one loads exactly what a careful reader finds in it, or is refused with a ValueError; in bounded time and memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file
from support import checkpoint_sources as sources

from convert import convert, read
from convert.huggingface import canonical_name, read_config

CASES = 130  # of each of four formats
SECONDS, MEGABYTES = 5, 300  # a case


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One checkpoint in every format, sharded where it can be."""
    place = tmp_path_factory.mktemp("whole")
    sources.huggingface(place / "huggingface", shards=True)
    convert(place / "huggingface", place / "jax", "jax")
    convert(place / "huggingface", place / "big_vision.npz", "big_vision")
    sources.big_vision(place / "huggingface", place / "compressed.npz", compressed=True)
    return place


def flip(data: bytearray, rng) -> None:
    """Some bytes set to others, half of the time near the start or the end, where headers are."""
    near = min(len(data), 3000)
    spots = [rng.integers(len(data)), rng.integers(near), len(data) - 1 - rng.integers(near)]
    for _ in range(rng.integers(1, 6)):
        data[spots[rng.integers(3)]] = rng.integers(256)


def truncate(data: bytearray, rng) -> None:
    del data[rng.integers(len(data)) :]


def drop(data: bytearray, rng) -> None:
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 100)]


def insert(data: bytearray, rng) -> None:
    start = rng.integers(min(len(data), 3000))
    data[start:start] = rng.bytes(rng.integers(1, 50))


def digits(data: bytearray, rng) -> None:
    """A number of the header becomes another: shapes, offsets, sizes."""
    spots = [i for i, byte in enumerate(data[:20000]) if chr(byte).isdigit()]
    for _ in range(rng.integers(1, 4)):
        if spots:
            data[spots[rng.integers(len(spots))]] = ord(str(rng.integers(10)))


def extend(data: bytearray, rng) -> None:
    data += rng.bytes(rng.integers(1, 1000))


def length(data: bytearray, rng) -> None:
    """The eight bytes that say how long a safetensors header is, or what begins a zip or JSON."""
    lengths = [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, int(rng.integers(2**20))]
    data[:8] = lengths[rng.integers(len(lengths))].to_bytes(8, "little")


DAMAGES = [flip, flip, truncate, drop, insert, digits, digits, extend, length]


def damaged(whole: Path, name: str, work: Path, seed: int) -> tuple[Path, str]:
    """A copy of a checkpoint with one file damaged, and what was done to it."""
    rng, copy = np.random.default_rng(seed), work / name
    if copy.exists():
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file()) if copy.is_dir() else [copy]
    heads = [file for file in files if file.suffix in (".json", ".safetensors", "") or file.name in (".zarray", "_METADATA")]
    file, damage = files[rng.integers(len(files))] if rng.random() < 0.5 else heads[rng.integers(len(heads))] if heads else copy, None
    data = bytearray(file.read_bytes())
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    damage(data, rng)
    file.write_bytes(data)
    return copy, f"seed {seed}: {damage.__name__} of {file.relative_to(work)}"


def oracle_huggingface(copy: Path) -> dict[str, np.ndarray]:
    return {canonical_name(key): value for file in copy.glob("*.safetensors") for key, value in load_file(file).items()}


def oracle_npz(copy: Path) -> dict[str, np.ndarray]:
    with np.load(copy, allow_pickle=False) as archive:
        return {key.removeprefix("params/"): archive[key] for key in archive}


def oracle_jax(copy: Path) -> dict[str, np.ndarray]:
    import jax

    with ocp.StandardCheckpointer() as orbax:
        leaves = jax.tree_util.tree_flatten_with_path(orbax.restore(copy / "params"))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def bits(arrays) -> np.ndarray:
    """All numbers as they lie in memory, sorted: the formats cut and transpose the same ones differently."""
    return np.sort(np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint32) for array in arrays]))


@pytest.mark.parametrize("name", ["huggingface", "jax", "big_vision.npz", "compressed.npz"])
def test_fuzz(whole, tmp_path, name):
    """What is read is what the format's own library reads from the damaged files."""
    config = read_config(whole / "huggingface")
    loaded, refused = 0, 0
    for seed in range(CASES):
        copy, what = damaged(whole, name, tmp_path, seed)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            checkpoint = read(copy, config if name.endswith("npz") else None)
            arrays = {path: tensor.read().copy() for path, tensor in checkpoint.tensors.items()}
        except ValueError as error:
            assert str(error).strip() and "Traceback" not in str(error), what
            refused += 1
        else:
            loaded += 1
            same_as_oracle(name, copy, arrays, what)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert time.monotonic() - start < SECONDS and grown < MEGABYTES, what
    assert refused > CASES / 4 and loaded + refused == CASES, (loaded, refused)


def same_as_oracle(name: str, copy: Path, arrays: dict[str, np.ndarray], what: str) -> None:
    try:
        expected = {"huggingface": oracle_huggingface, "jax": oracle_jax}.get(name, oracle_npz)(copy)
    except (ValueError, KeyError, OSError, SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, TypeError) as error:
        raise AssertionError(f"{what}: read, but its own library says {error}") from None
    if name.endswith("npz"):
        rows = len(expected["llm/embedder/input_embedding"])
        arrays["decoder/embedder/table"] = arrays["decoder/embedder/table"][:rows]
    assert (bits(arrays.values()) == bits(expected.values())).all(), what


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """A member that claims, and deflates to, far more than its place in the model."""
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("params/llm/embedder/input_embedding.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (2**27, 1)})
        for _ in range(2**9):
            member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        read(file)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


@pytest.mark.parametrize("claim", [2**30, 10**15])
def test_a_header_that_claims_the_world(whole, tmp_path, claim):
    """A shape larger than the file: nothing is allocated for it."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [claim], "data_offsets": [0, 4 * claim]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    shutil.copy(whole / "huggingface" / "config.json", tmp_path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("llm/embedder/input_embedding.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (claim, 8)})
        member.write(bytes(96))
    for path in (tmp_path, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match=r"has \d+|sound shape"):
            read(path)
