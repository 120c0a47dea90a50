"""The cost of a conversion of real size: memory beyond importing jax, and time compared with
copying the file. `pytest -m full_size -s`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from convert.config import config_to_json
from convert.huggingface import INDEX, MAX_SHARD
from convert.match import file_shapes, huggingface_weights
from convert.safetensors import make_header
from convert.tensor import DTYPES
from paligemma_jax.model.config import PaliGemmaConfig

MEASURE = """
import json, resource, sys, time
import jax, numpy, orbax.checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
from convert import convert
start = time.monotonic()
convert(*sys.argv[1:4], **json.loads(sys.argv[4]))
print(json.dumps({"seconds": time.monotonic() - start, "megabytes": peak() - before}))
"""


def write_noise(directory: Path, config: PaliGemmaConfig) -> int:
    """Write a bfloat16 checkpoint of finite noise; returns the bytes of its largest tensor."""
    sizes = {key: 2 * math.prod(shape) for key, shape in shapes(config).items()}
    files, used = [[]], 0
    for key, nbytes in sizes.items():
        if used + nbytes > MAX_SHARD:
            files, used = [*files, []], 0
        files[-1].append(key)
        used += nbytes
    directory.mkdir()
    weight_map = {}
    for i, keys in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        write_shard(directory / name, {key: shapes(config)[key] for key in keys})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config_to_json(config, "bfloat16")))
    return max(sizes.values())


def shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    return file_shapes(huggingface_weights(config))


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 2**16, 2**24, np.uint16) & 0xBFFF).tobytes()
    header, _ = make_header({key: (DTYPES["bfloat16"], shape) for key, shape in shapes.items()})
    with file.open("wb") as out:
        out.write(header)
        for shape in shapes.values():
            left = 2 * math.prod(shape)
            for start in range(0, left, len(noise)):
                out.write(noise[: min(left - start, len(noise))])


def measure(source: Path, destination: Path, to: str, **options) -> dict[str, float]:
    """Seconds and megabytes of a conversion in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    arguments = [str(source), str(destination), to, json.dumps(options)]
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, check=True)
    return json.loads(result.stdout)


def copy_seconds(source: Path, destination: Path) -> float:
    """The time of cp and sync."""
    os.sync()
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, destination], check=True)
    os.sync()
    seconds = time.monotonic() - start
    subprocess.run(["rm", "-rf", destination], check=True)
    return seconds


@pytest.fixture
def disk(tmp_path):
    """A directory for up to 25 GB, removed after the test."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path], check=True)


@pytest.mark.full_size
def test_a_3b_checkpoint(disk):
    """6 GB, every direction: under 1.5 GB of memory, and at most 1.5 times the time of cp and sync
    (medians of three, taken in turn)."""
    write_noise(disk / "hf", PaliGemmaConfig.preset("3b-224"))
    chain = [
        ("hf", "jax", "jax"),
        ("jax", "hf2", "huggingface"),
        ("jax", "npz", "big_vision"),
        ("npz", "hf3", "huggingface"),
    ]
    for source, destination, to in chain:
        ours, copies = [], []
        for _ in range(3):
            copies.append(copy_seconds(disk / source, disk / "copy"))
            subprocess.run(["rm", "-rf", disk / destination], check=True)
            ours.append(measure(disk / source, disk / destination, to))
        seconds, copy = np.median([run["seconds"] for run in ours]), np.median(copies)
        memory = max(run["megabytes"] for run in ours)
        times = f"{seconds:.1f} s, cp and sync {copy:.1f} s"
        print(f"{source} -> {to}: {times}, {memory:.0f} MB beyond importing jax", ours, copies)
        assert memory < 1500
        has_checksums = source == "npz" or to == "big_vision"  # of every byte
        assert has_checksums or seconds < 1.5 * copy
    difference = subprocess.run(["diff", "-rq", disk / "hf", disk / "hf2"], check=False)
    assert not difference.returncode


@pytest.mark.full_size
@pytest.mark.parametrize("to", ["jax", "huggingface", "big_vision"])
def test_a_28b_checkpoint_with_few_layers(disk, to):
    """Memory does not depend on depth: two layers of a 28b, with its largest tensor (2.4 GB), need
    less than that tensor."""
    config = PaliGemmaConfig.preset("28b-224")
    decoder = replace(config.decoder, num_hidden_layers=2)
    shallow = replace(config, decoder=decoder, vision=replace(config.vision, num_hidden_layers=2))
    largest = write_noise(disk / "hf", shallow)
    dtype = "float32" if to == "jax" else None
    run = measure(disk / "hf", disk / "out", to, dtype=dtype)
    memory = f"{run['megabytes']:.0f} MB beyond importing jax"
    print(f"28b -> {to}: {run['seconds']:.1f} s, {memory}; largest tensor {largest / 2**20:.0f} MB")
    assert run["megabytes"] * 2**20 < 2 * largest / 4
