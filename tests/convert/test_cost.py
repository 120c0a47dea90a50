"""What a conversion of real size costs: memory beyond importing jax, and time against copying the file. `pytest -m full_size -s`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from convert.config import write_config
from convert.huggingface import INDEX, MAX_SHARD, expected_shapes
from convert.safetensors import make_header
from convert.tensor import DTYPES
from paligemma_jax.model.config import PaliGemmaConfig

MEASURED = """
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
    """A bfloat16 checkpoint of finite noise; returns the bytes of its largest tensor."""
    rng, shards, used = np.random.default_rng(0), [{}], 0
    noise = (rng.integers(0, 2**16, 2**24, np.uint16) & 0xBFFF).tobytes()
    for key, shape in expected_shapes(config).items():
        nbytes = int(np.prod(shape)) * 2
        if used + nbytes > MAX_SHARD:
            shards, used = [*shards, {}], 0
        shards[-1][key], used = (DTYPES["bfloat16"], shape), used + nbytes
    directory.mkdir()
    names = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for name, shard in names.items():
        with (directory / name).open("wb") as file:
            file.write(make_header(shard)[0])
            for _, shape in shard.values():
                left = int(np.prod(shape)) * 2
                for _ in range(0, left, len(noise)):
                    file.write(noise[: min(left, len(noise))])
                    left -= len(noise)
    weight_map = {key: name for name, shard in names.items() for key in shard}
    total = sum(int(np.prod(shape)) * 2 for shard in shards for _, shape in shard.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
    return max(int(np.prod(shape)) * 2 for shard in names.values() for _, shape in shard.values())


def measured(source: Path, destination: Path, to: str, **options) -> dict[str, float]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(source), str(destination), to, json.dumps(options)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def copied(source: Path, destination: Path) -> float:
    """Seconds of cp, to the disk."""
    os.sync()
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, destination], check=True)
    os.sync()
    seconds = time.monotonic() - start
    subprocess.run(["rm", "-rf", destination], check=True)
    return seconds


@pytest.fixture
def room(tmp_path):
    """A directory that is gone after the test: it holds up to 25 GB."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path], check=True)


@pytest.mark.full_size
def test_3b(room):
    """6 GB, every direction: under 1.5 GB of memory, at most 1.5 times as long as cp and sync (medians of three, taken in turn)."""
    write_noise(room / "hf", PaliGemmaConfig.preset("3b-224"))
    chain = [("hf", "jax", "jax"), ("jax", "hf2", "huggingface"), ("jax", "npz", "big_vision"), ("npz", "hf3", "huggingface")]
    for source, destination, to in chain:
        ours, theirs = [], []
        for _ in range(3):
            theirs.append(copied(room / source, room / "copy"))
            subprocess.run(["rm", "-rf", room / destination], check=True)
            ours.append(measured(room / source, room / destination, to))
        seconds, memory = np.median([run["seconds"] for run in ours]), max(run["megabytes"] for run in ours)
        print(f"{source} -> {to}: {seconds:.1f} s, cp and sync {np.median(theirs):.1f} s, {memory:.0f} MB beyond importing jax", ours, theirs)
        assert memory < 1500
        assert seconds < 1.5 * np.median(theirs) or source == "npz" or to == "big_vision"  # these have checksums of every byte
    assert not subprocess.run(["diff", "-rq", room / "hf", room / "hf2"], check=False).returncode


@pytest.mark.full_size
@pytest.mark.parametrize("to", ["jax", "huggingface", "big_vision"])
def test_28b_with_few_layers(room, to):
    """Memory does not depend on depth: two layers of a 28b, its largest tensor (2.4 GB) included, need less than that tensor."""
    config = PaliGemmaConfig.preset("28b-224")
    few = replace(config, decoder=replace(config.decoder, num_hidden_layers=2), vision=replace(config.vision, num_hidden_layers=2))
    largest = write_noise(room / "hf", few)
    run = measured(room / "hf", room / "out", to, dtype="float32" if to == "jax" else None)
    print(f"28b -> {to}: {run['seconds']:.1f} s, {run['megabytes']:.0f} MB beyond importing jax; largest tensor {largest / 2**20:.0f} MB")
    assert run["megabytes"] * 2**20 < 2 * largest / 4
