"""Loading onto eight devices: each gets its slices, only those are read, and the logits are the
same as on one device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from support import hf_models
from support.on_devices import device_flags
from support.paths import GOLDEN, ROOT, TESTS

from convert import convert

ON_EIGHT_DEVICES = """
import json, sys
from types import SimpleNamespace

import jax
import numpy as np

sys.path[:0] = {paths!r}
from support import checkpoint_sources as sources
from support import hf_models
from convert import tensor
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.sharding.mesh import make_mesh

jax.config.update("jax_default_matmul_precision", "highest")
reads, load = [], tensor.Tensor.load


def record(self, index=()):
    reads.append(load(self, index))
    return reads[-1]


def largest_shard(leaf):
    return max(shard.data.nbytes for shard in leaf.addressable_shards)


def bytes_on(device):
    shards = [shard for leaf in leaves.values() for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


vision = SimpleNamespace(image_size=56, patch_size=14)
config = SimpleNamespace(vision_config=vision, image_token_index=hf_models.IMAGE)
inputs = hf_models.random_inputs(SimpleNamespace(config=config))
reference = load_model({source!r})
size = sum(leaf.nbytes for leaf in parameters(reference).values())
expected = sources.logits(reference, inputs)
tensor.Tensor.load = record
results = []
for shape in {meshes!r}:
    reads.clear()
    mesh = make_mesh(*shape)
    model = load_model({source!r}, mesh=mesh)
    read = sum(array.nbytes for array in reads) / size
    leaves = parameters(model)
    replicated = [path for path, leaf in leaves.items() if leaf.sharding.is_fully_replicated]
    sharded = [path for path in leaves if path not in replicated]
    parts = [largest_shard(leaves[path]) / leaves[path].nbytes for path in sharded]
    logits = sources.logits(model, inputs)
    table = load_model({source!r}, "bfloat16", mesh=mesh).decoder.embedder.table
    results.append(
        dict(
            difference=float(np.abs(logits - expected)[inputs.valid].max()),
            sharded=len(sharded),
            largest_part=max(parts, default=1),
            replicated=sum(leaves[path].nbytes for path in replicated) / size,
            read=read,
            on_a_device=max(map(bytes_on, jax.devices())) / size,
            dtype=str(table[...].dtype),
        )
    )
print(json.dumps(results))
"""
# (data, fsdp, tensor); the last does not divide the key heads
MESHES = [(1, 1, 4), (1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 1, 8)]
TEXT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
VISION = {"num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}


def run_on_devices(count, code, *arguments):
    """Run code in a process with this many CPU devices, and return its stdout."""
    environment = os.environ | {
        "XLA_FLAGS": device_flags(count),
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "form", ["huggingface", *(pytest.param(f, marks=pytest.mark.slow) for f in ("jax", "orbax"))]
)
def test_each_device_gets_its_slices(tmp_path, form):
    model = hf_models.random_model("pg2", text=TEXT, vision=VISION)
    source = hf_models.save_checkpoint(model, tmp_path / "huggingface", shards=True)
    if form != "huggingface":
        convert(source, tmp_path / "jax", "jax")
        source = tmp_path / "jax"
    if form == "orbax":
        rewrite_with_orbax(source)
    meshes = MESHES if form == "huggingface" else MESHES[1:3]
    paths = [str(TESTS), str(ROOT)]
    code = ON_EIGHT_DEVICES.format(paths=paths, source=str(source), meshes=meshes)
    results = json.loads(run_on_devices(8, code).splitlines()[-1])
    for (_, fsdp, tensor), result in zip(meshes, results, strict=True):
        print(form, (fsdp, tensor), result)
        assert result["difference"] < 2e-4 and result["dtype"] == "bfloat16"
        assert result["read"] == 1  # every byte once
        if fsdp * tensor > 1:
            assert result["sharded"] > 20
            assert result["replicated"] < (0.05 if fsdp > 1 else 0.45)
            # no device has all of a sharded parameter
            assert result["largest_part"] <= 1 / min(n for n in (fsdp, tensor) if n > 1)
            assert result["on_a_device"] < result["replicated"] + 2 / (fsdp * tensor)


def test_a_sharded_model_gives_the_same_answers():
    code = """if True:
        import sys
        import paligemma_jax as pg
        from paligemma_jax.sharding.mesh import make_mesh

        def generate(mesh):
            predictor = pg.load(sys.argv[1], mesh=mesh)
            return predictor.generate([sys.argv[2]] * 2, ["caption en", "detect cat"], 8)

        expected, sharded = generate(None), generate(make_mesh(1, 2, 2))
        assert expected == sharded and any(expected), (expected, sharded)
    """
    run_on_devices(4, code, GOLDEN / "pg2", GOLDEN / "image.png")


def rewrite_with_orbax(directory):
    """Replace params/ with what Orbax itself saves: one database, compressed."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory / "params")
        shutil.rmtree(directory / "params")
        checkpointer.save(directory / "params", tree)
