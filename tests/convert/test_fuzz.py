"""Damaged inputs are loaded exactly as the format's own library loads them, or refused with a
ValueError, in bounded time and memory."""

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
from convert.config import load_config
from convert.huggingface import canonical_name

CASES = {"jax": 40}  # Orbax takes a second for each; others have 130
SECONDS, MEGABYTES = 5, 300  # per case


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """One checkpoint in every format, sharded if possible."""
    place = tmp_path_factory.mktemp("intact")
    sources.huggingface(place / "huggingface", shards=True)
    convert(place / "huggingface", place / "jax", "jax")
    convert(place / "huggingface", place / "big_vision.npz", "big_vision")
    sources.big_vision(place / "huggingface", place / "compressed.npz", compressed=True)
    return place


def flip(data: bytearray, rng) -> None:
    """Change some bytes, most often near the start or the end, where headers are."""
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
    """Change digits of the header: of shapes, offsets, sizes."""
    spots = [i for i, byte in enumerate(data[:20000]) if chr(byte).isdigit()]
    for _ in range(rng.integers(1, 4)):
        if spots:
            data[spots[rng.integers(len(spots))]] = ord(str(rng.integers(10)))


def extend(data: bytearray, rng) -> None:
    data += rng.bytes(rng.integers(1, 1000))


def length(data: bytearray, rng) -> None:
    """Change the first eight bytes: the length of a safetensors header, or the start of a zip or
    JSON file."""
    lengths = [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, int(rng.integers(2**20))]
    data[:8] = lengths[rng.integers(len(lengths))].to_bytes(8, "little")


REFUSALS = (ValueError, KeyError, OSError, SafetensorError, zipfile.BadZipFile, TypeError)
DAMAGES = [flip, flip, truncate, drop, insert, digits, digits, extend, length]


def damage_copy(intact: Path, name: str, work: Path, seed: int) -> tuple[Path, str]:
    """A copy of a checkpoint with one file damaged, and a description of the damage."""
    rng, copy = np.random.default_rng(seed), work / name
    if copy.exists():
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    (shutil.copytree if (intact / name).is_dir() else shutil.copy)(intact / name, copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file()) if copy.is_dir() else [copy]
    suffixes, names = (".json", ".safetensors", ""), (".zarray", "_METADATA")
    heads = [file for file in files if file.suffix in suffixes or file.name in names]
    candidates = files if rng.random() < 0.5 else heads
    file = candidates[rng.integers(len(candidates))] if candidates else copy
    data = bytearray(file.read_bytes())
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    damage(data, rng)
    file.write_bytes(data)
    return copy, f"seed {seed}: {damage.__name__} of {file.relative_to(work)}"


def oracle_huggingface(copy: Path) -> dict[str, np.ndarray]:
    files = copy.glob("*.safetensors")
    return {canonical_name(key): v for file in files for key, v in load_file(file).items()}


def oracle_npz(copy: Path) -> dict[str, np.ndarray]:
    with np.load(copy, allow_pickle=False) as archive:
        return {key.removeprefix("params/"): archive[key] for key in archive}


def oracle_jax(copy: Path) -> dict[str, np.ndarray]:
    import jax

    with ocp.StandardCheckpointer() as orbax:
        leaves = jax.tree_util.tree_flatten_with_path(orbax.restore(copy / "params"))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def bits(arrays) -> np.ndarray:
    """The bits of all numbers, sorted, since formats slice and transpose them differently."""
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint32) for array in arrays]
    return np.sort(np.concatenate(flat))


@pytest.mark.parametrize("name", ["huggingface", "jax", "big_vision.npz", "compressed.npz"])
def test_damaged_files(intact, tmp_path, name):
    """Arrays equal those that the format's own library reads from the damaged files."""
    config = load_config(intact / "huggingface")
    loaded, refused, cases = 0, 0, CASES.get(name, 130)
    for seed in range(cases):
        copy, damage = damage_copy(intact, name, tmp_path, seed)
        start, before = time.monotonic(), peak_memory()
        try:
            checkpoint = read(copy, config if name.endswith("npz") else None)
            arrays = {path: array.copy() for path, array in sources.arrays(checkpoint).items()}
        except ValueError as error:
            assert str(error).strip() and "Traceback" not in str(error), damage
            refused += 1
        else:
            loaded += 1
            check_against_oracle(name, copy, arrays, damage)
        grown = peak_memory() - before
        assert time.monotonic() - start < SECONDS and grown < MEGABYTES, damage
    assert refused > cases / 4 and loaded + refused == cases, (loaded, refused)


def peak_memory() -> float:
    """The peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_against_oracle(name: str, copy: Path, arrays: dict[str, np.ndarray], damage: str) -> None:
    oracle = {"huggingface": oracle_huggingface, "jax": oracle_jax}.get(name, oracle_npz)
    try:
        expected = oracle(copy)
    except REFUSALS as error:
        raise AssertionError(f"{damage}: read here, but its own library raises {error}") from None
    if name.endswith("npz"):
        rows = len(expected["llm/embedder/input_embedding"])
        arrays["decoder/embedder/table"] = arrays["decoder/embedder/table"][:rows]
    assert (bits(arrays.values()) == bits(expected.values())).all(), damage


def write_header(member, shape: tuple[int, ...]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """A member decompresses to far more bytes than the model expects."""
    file, name = tmp_path / "bomb.npz", "params/llm/embedder/input_embedding.npy"
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open(name, "w") as member:
        write_header(member, (2**27, 1))
        for _ in range(2**9):
            member.write(bytes(2**20))
    before = peak_memory()
    with pytest.raises(ValueError):
        read(file)
    assert peak_memory() - before < 100


@pytest.mark.parametrize("claim", [2**30, 10**15])
def test_nothing_is_allocated_for_a_shape_larger_than_the_file(intact, tmp_path, claim):
    entry = {"dtype": "F32", "shape": [claim], "data_offsets": [0, 4 * claim]}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    shutil.copy(intact / "huggingface" / "config.json", tmp_path)
    archive = zipfile.ZipFile(tmp_path / "a.npz", "w")
    with archive, archive.open("llm/embedder/input_embedding.npy", "w") as member:
        write_header(member, (claim, 8))
        member.write(bytes(96))
    for path in (tmp_path, tmp_path / "a.npz"):
        with pytest.raises(ValueError, match=r"has \d+|an integer of at most"):
            read(path)
