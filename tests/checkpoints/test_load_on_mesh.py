"""Loading into place: on eight devices, each is given its slices, only those are read, and the logits are those of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import hf_models
from support.paths import GOLDEN, ROOT, TESTS

from convert import convert

ON_EIGHT = """
import json, sys
import jax, numpy as np
from pathlib import Path
sys.path[:0] = {paths!r}
from support import checkpoint_sources as sources
from support import hf_models
from convert import tensor
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.sharding.mesh import make_mesh
from types import SimpleNamespace as Config

jax.config.update("jax_default_matmul_precision", "highest")
size = sum(leaf.nbytes for leaf in parameters(load_model(Path({source!r}))).values())
read, load = [], tensor.Tensor.load
tensor.Tensor.load = lambda self, index=(): read.append(load(self, index)) or read[-1]
held = lambda leaf, device: sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device == device)
vision = Config(image_size=56, patch_size=14)
inputs = hf_models.random_inputs(Config(config=Config(vision_config=vision, image_token_index=hf_models.IMAGE)))
expected, found = sources.logits(load_model(Path({source!r})), inputs), []
for shape in {meshes!r}:
    read.clear()
    mesh = make_mesh(*shape)
    model = load_model(Path({source!r}), mesh=mesh)
    leaves = parameters(model)
    whole = [path for path, leaf in leaves.items() if leaf.sharding.is_fully_replicated]
    parts = [max(shard.data.nbytes for shard in leaf.addressable_shards) / leaf.nbytes for path, leaf in leaves.items() if path not in whole]
    logits = sources.logits(model, inputs)
    found.append(dict(
        difference=float(np.abs(logits - expected)[inputs.valid].max()), largest_part=max(parts, default=1), sharded=len(parts),
        whole=sum(leaves[path].nbytes for path in whole) / size, read=sum(a.nbytes for a in read) / size,
        on_a_device=max(sum(held(leaf, device) for leaf in leaves.values()) for device in jax.devices()) / size,
        half=str(load_model(Path({source!r}), "bfloat16", mesh=mesh).decoder.embedder.table[...].dtype),
    ))
print(json.dumps(found))
"""
MESHES = [(1, 1, 4), (1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 1, 8)]  # the last does not divide the key heads
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}
VISION = {"num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}


@pytest.mark.parametrize("form", ["huggingface", "jax", "orbax"])
def test_eight_devices(tmp_path, form):
    source = hf_models.save_checkpoint(hf_models.random_model("pg2", text=TEXT, vision=VISION), tmp_path / "huggingface", shards=True)
    if form != "huggingface":
        convert(source, tmp_path / "jax", "jax")
        source = tmp_path / "jax"
    if form == "orbax":
        rewrite_by_orbax(source)
    meshes = MESHES if form == "huggingface" else MESHES[1:3]
    code = ON_EIGHT.format(paths=[str(TESTS), str(ROOT)], source=str(source), meshes=meshes)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, fsdp, tensor), got in zip(meshes, json.loads(done.stdout.splitlines()[-1])):
        print(form, (fsdp, tensor), got)
        assert got["difference"] < 2e-4 and got["half"] == "bfloat16"
        if (ways := fsdp * tensor) > 1:
            assert got["sharded"] > 20 and got["whole"] < (0.05 if fsdp > 1 else 0.45)
            assert got["largest_part"] <= 1 / min(n for n in (fsdp, tensor) if n > 1)  # no device holds the whole of a sharded parameter
            assert got["on_a_device"] < got["whole"] + 2 / ways
        assert got["read"] == 1  # every byte once


def test_a_sharded_model_answers_as_the_whole_one():
    code = """if True:
        import paligemma_jax as pg, sys
        from paligemma_jax.sharding.mesh import make_mesh
        ask = lambda mesh: pg.load(sys.argv[1], mesh=mesh).generate([sys.argv[2]] * 2, ["caption en", "detect cat"], 8)
        one, four = ask(None), ask(make_mesh(1, 2, 2))
        assert one == four and any(one), (one, four)
    """
    golden = GOLDEN
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, golden / "pg2", golden / "image.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=golden.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]


def rewrite_by_orbax(directory: Path) -> None:
    """params/ as Orbax itself saves it: one database, compressed."""
    import shutil

    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory / "params")
        shutil.rmtree(directory / "params")
        checkpointer.save(directory / "params", tree)
