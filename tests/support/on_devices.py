"""What the tests of sharding run in a process of its own: `python tests/support/on_devices.py DEVICES FUNCTION ARGUMENTS`, both as JSON; prints JSON."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.paths import ROOT, TESTS


def call(devices: int, function: str, *arguments: Any, **options: Any) -> Any:
    """What `function` below returns in a process with so many CPU devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "PALIGEMMA_JAX_CACHE": "off"}
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, function, json.dumps([arguments, options])]
    done = subprocess.run(command, env=os.environ | flags | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def small(kind: str, layers: int = 1) -> Any:
    """Gemma 1 has one key head, Gemma 2 half as many as heads: over 4 devices they divide, over 8 they do not."""
    from paligemma_jax.model.config import PaliGemmaConfig

    config = PaliGemmaConfig.preset("3b-224" if kind == "pg2" else "pg1-3b-224")
    vision = replace(config.vision, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, image_size=56)
    sizes = dict(hidden_size=64, num_hidden_layers=layers, num_attention_heads=8, head_dim=8, intermediate_size=96, vocab_size=512)
    keys = 4 if kind == "pg2" else 1
    return replace(config, vision=vision, decoder=replace(config.decoder, **sizes, num_key_value_heads=keys), image_token_id=500, dtype="float32")


def batch(config: Any, rows: int) -> Any:
    """Ragged rows of one image each, with an answer of 8 tokens."""
    import numpy as np

    from paligemma_jax.bench.training import answering
    from paligemma_jax.checkpoints.synthetic import synthetic_inputs
    from paligemma_jax.training.batches import Batch

    inputs = answering(synthetic_inputs(config, rows, 16), 8)
    inputs.prefix[:, -9] = inputs.valid[:, -9] = np.arange(rows) % 2 == 0
    return Batch(replace(inputs, images=inputs.images[:, None]), np.linspace(0.5, 1.5, rows, dtype=np.float32))


def compare(cases: list[list]) -> list[dict]:
    """Each case (kind, form, train, quantize, mesh) against one device: logits, loss, gradients, tokens."""
    import jax
    import numpy as np

    from paligemma_jax.sharding import rules
    from paligemma_jax.sharding.mesh import resolve_mesh

    found = []
    for kind, form, train, quantize, mesh in cases:
        config = small(kind)
        rules._said.clear()
        with warnings.catch_warnings(record=True, action="always") as told:
            one, many = (_all_of(config, form, train, quantize, resolve_mesh(where, config)) for where in (None, mesh))
        worst = lambda a, b: float(np.abs(a - b).max() / max(1, np.abs(a).max()))
        found.append(
            dict(
                {name: worst(one[name], many[name]) for name in ("logits", "loss")},
                gradients=max(worst(value, many["gradients"][path]) for path, value in one["gradients"].items()),
                largest=float(max(np.abs(value).max() for value in one["gradients"].values())),
                same_tokens=bool((one["tokens"] == many["tokens"]).all()), different=len(np.unique(one["tokens"])),
                strays=many["strays"], part=many["part"], told=[str(warning.message) for warning in told if "whole on every" in str(warning.message)],
            )
        )  # fmt: skip
        jax.clear_caches()
    return found


def _all_of(config: Any, form: str, train: str, quantize: str | None, mesh: Any) -> dict:
    import jax
    import numpy as np

    from paligemma_jax.checkpoints.synthetic import random_model
    from paligemma_jax.inference import generate, scoring
    from paligemma_jax.model.tree import parameters, with_parameters
    from paligemma_jax.sharding.arrays import distribute, shard_batch
    from paligemma_jax.training.batches import max_targets
    from paligemma_jax.training.config import FinetuneConfig
    from paligemma_jax.training.prepare import prepare_model
    from paligemma_jax.training.trainer import Trainer

    options = FinetuneConfig("", "", train=train, quantize=quantize, layers=form, warmup=0, clip=0, learning_rate=1.0, optimizer="sgd", lora_rank=2)
    rng = np.random.default_rng(0)
    noise = {path: value + rng.normal(0, 0.1, value.shape).astype("f") for path, value in sorted(parameters(random_model(config)).items())}
    model = prepare_model(with_parameters(random_model(config), noise.__getitem__), options)
    learned = {p: a + rng.normal(0, 0.1, a.shape).astype("f") if "lora_b" in p else a for p, a in sorted(parameters(model).items())}
    model = distribute(with_parameters(model, learned.__getitem__), mesh)
    data = batch(config, 8)
    logits = np.asarray(scoring.forward(model, data.inputs))
    asked = replace(data.inputs, valid=data.inputs.prefix)
    tokens = generate.generate(model, asked, 6, slots=asked.tokens.shape[1] + 6).tokens
    trainer = Trainer(model, options, 10)
    state = trainer.start()
    before = {path: np.array(value) for path, value in state.trainable.items()}
    places = jax.tree.map(lambda a: a.sharding, state)
    state, report = trainer.step(state, trainer.frozen, shard_batch(data, mesh), max_targets=max_targets(data))
    strays = sum(not a.sharding.is_equivalent_to(b, a.ndim) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(places)))
    held = [max(shard.data.nbytes for shard in a.addressable_shards) for a in jax.tree.leaves((state.trainable, state.optimizer))]
    return dict(
        logits=logits, tokens=tokens, loss=np.asarray(report["loss"]), strays=strays,
        gradients={path: before[path] - np.asarray(value) for path, value in state.trainable.items()},
        part=sum(held) / sum(a.nbytes for a in jax.tree.leaves((state.trainable, state.optimizer))),
    )  # fmt: skip


def program(config: Any, mesh: Any, rows: int, **options: Any) -> Any:
    """The compiled training step: of shapes, without an array."""
    from paligemma_jax.checkpoints.load import abstract_model
    from paligemma_jax.sharding.arrays import batch_shapes
    from paligemma_jax.sharding.rules import sharded_shapes
    from paligemma_jax.training.config import FinetuneConfig
    from paligemma_jax.training.prepare import trainer_shapes

    trainer, state, frozen = trainer_shapes(abstract_model(config), FinetuneConfig("", "", batch_size=rows, **options))
    data = batch_shapes(batch(config, rows), mesh)
    return trainer.step.lower(sharded_shapes(state, mesh), sharded_shapes(frozen, mesh), data, max_targets=8).compile()


def collectives(mesh: str, rows: int, **options: Any) -> list[list]:
    """[name, shapes that come out, operation, dtypes] of every collective of a step: 3 stacked layers, a vocabulary of two chunks."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    config = small("pg2", layers=3)
    config = replace(config, decoder=replace(config.decoder, vocab_size=2**16))
    text = program(config, resolve_mesh(mesh, config), rows, remat="full", **options).as_text()
    found = []
    for line in text.splitlines():
        if named := re.search(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line):
            dtypes, shapes = zip(*re.findall(r"(\w+)\[([\d,]*)\]", named[1]))
            shapes = [[int(n) for n in shape.split(",") if n] for shape in shapes]
            operation = re.search(r'op_name="([^"]*)"', line)
            found.append([named[2], shapes, operation[1] if operation else "", dtypes])
    return found


def auto(cases: list[tuple]) -> list[dict]:
    """The mesh that "auto" is for (kind, training?, rows)."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    return [dict(resolve_mesh("auto", small(kind), training, rows=rows).shape) for kind, training, rows in cases]


def flops(meshes: list[tuple[str, int]]) -> list[float]:
    """Of a training step on one device, by the compiler's count, for so many rows each."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    config = small("pg2")
    return [program(config, resolve_mesh(mesh, config), rows, layers="list").cost_analysis()["flops"] for mesh, rows in meshes]


def loaded(directory: str, quantize: str | None = None) -> dict:
    """A checkpoint on eight devices: the paths of what is not as on one, to the bit, and of what lies in slices."""
    import numpy as np

    from paligemma_jax.checkpoints.load import load_model
    from paligemma_jax.model.tree import parameters

    one = parameters(load_model(Path(directory), quantize=quantize))
    found = parameters(load_model(Path(directory), mesh="data=1,fsdp=2,tensor=4", quantize=quantize))
    other = [path for path, value in found.items() if value.dtype != one[path].dtype or (np.asarray(value) != np.asarray(one[path])).any()]
    return {"other": other, "sliced": [path for path, value in found.items() if not value.sharding.is_fully_replicated]}


def said(commands: list[list[str]]) -> list[str]:
    """What `paligemma-jax` prints when it is run so, or what it says is wrong."""
    from paligemma_jax.cli import main

    found = []
    for sys.argv in (["paligemma-jax", *arguments] for arguments in commands):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), suppress(SystemExit):
            main()
        found.append(out.getvalue())
    return found


def predicted(arguments: list[str]) -> list[int]:
    """`paligemma-jax predict`: the rows of each batch that it asks the model for."""
    from paligemma_jax.inference import generate

    asked, prefill = [], generate.prefill

    def watched(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        asked.append(len(inputs.tokens))
        return prefill(model, inputs, *rest, **named)

    generate.prefill = watched  # type: ignore[assignment]
    said([["predict", *arguments]])
    return asked


if __name__ == "__main__":
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # what XLA's own passes and LLVM do to the same sums takes most of the time
    given, options = json.loads(sys.argv[2])
    print(json.dumps(globals()[sys.argv[1]](*given, **options)))
