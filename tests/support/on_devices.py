"""Functions for the tests of sharding, run in a process with several CPU devices.

`call` runs `python tests/support/on_devices.py FUNCTION ARGUMENTS`; arguments and results are JSON.
FUNCTION is one below, or one of another file, such as `support.own_meshes.gradient_shardings`.
"""

from __future__ import annotations

import importlib
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
from typing import TYPE_CHECKING, Any

from support.paths import ROOT, TESTS

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from paligemma_jax.model.config import PaliGemmaConfig
    from paligemma_jax.model.paligemma import PaliGemma
    from paligemma_jax.processing.processor import Inputs
    from paligemma_jax.training.batches import Batch


def device_flags(count: int) -> str:
    """Return XLA_FLAGS for a process with that many CPU devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def call(devices: int, function: str, *arguments: object, **options: object) -> Any:  # any JSON
    """Return the result of a function, run in a process with that many CPU devices."""
    flags = {
        "XLA_FLAGS": device_flags(devices),
        "JAX_PLATFORMS": "cpu",
        # XLA starts a thread for each core. With fewer than there are devices, collectives that run
        # at the same time can wait for each other forever.
        "NPROC": "32",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, function, json.dumps([arguments, options])]
    process = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def small_config(kind: str, layers: int = 1) -> PaliGemmaConfig:
    """A small config. PaliGemma 1 has one key head, PaliGemma 2 half as many as query heads: 4
    devices divide them, 8 do not."""
    from paligemma_jax.model.config import PaliGemmaConfig

    config = PaliGemmaConfig.preset("3b-224" if kind == "pg2" else "pg1-3b-224")
    vision = replace(
        config.vision,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=56,
    )
    decoder = replace(
        config.decoder,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4 if kind == "pg2" else 1,
        head_dim=8,
        intermediate_size=96,
        vocab_size=512,
    )
    return replace(config, vision=vision, decoder=decoder, image_token_id=500, dtype="float32")


def make_batch(config: PaliGemmaConfig, rows: int) -> Batch:
    """Ragged rows of one image each, with an answer of 8 tokens."""
    import numpy as np

    from paligemma_jax.bench.training import with_targets
    from paligemma_jax.checkpoints.synthetic import synthetic_inputs
    from paligemma_jax.training.batches import Batch

    inputs = with_targets(synthetic_inputs(config, rows, 16), 8)
    inputs.prefix[:, -9] = inputs.valid[:, -9] = np.arange(rows) % 2 == 0
    inputs = replace(inputs, images=inputs.images[:, None])
    return Batch(inputs, np.linspace(0.5, 1.5, rows, dtype=np.float32))


def compare(cases: list[list]) -> list[dict]:
    """Compare each case (kind, layers, train, quantize, mesh) with one device."""
    import jax
    import numpy as np

    from paligemma_jax.sharding import rules
    from paligemma_jax.sharding.mesh import resolve_mesh

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(1, np.abs(a).max()))

    results = []
    for kind, layers, train, quantize, mesh in cases:
        config = small_config(kind)
        rules._warned.clear()
        with warnings.catch_warnings(record=True, action="always") as caught:
            single, sharded = (
                _compute(config, layers, train, quantize, resolve_mesh(name, config))
                for name in (None, mesh)
            )
        gradients = single["gradients"]
        messages = [str(warning.message) for warning in caught]
        results.append(
            {
                "logits": error(single["logits"], sharded["logits"]),
                "loss": error(single["loss"], sharded["loss"]),
                "gradients": max(
                    error(gradient, sharded["gradients"][path])
                    for path, gradient in gradients.items()
                ),
                "largest": float(max(np.abs(gradient).max() for gradient in gradients.values())),
                "same_tokens": bool((single["tokens"] == sharded["tokens"]).all()),
                "distinct_tokens": len(np.unique(single["tokens"])),
                "moved": sharded["moved"],
                "share": sharded["share"],
                "warnings": [text for text in messages if "every device replicates it" in text],
            }
        )
        jax.clear_caches()
    return results


def fused_attention_errors(key_heads: list[int]) -> dict[str, list[float]]:
    """The largest errors of fused attention and its gradients on data=2,fsdp=2,tensor=2, from
    plain attention on one device."""
    import jax
    import jax.numpy as jnp

    from paligemma_jax.model.attention import attend
    from paligemma_jax.model.masks import Mask, token_span
    from paligemma_jax.sharding.compiled import use_mesh
    from paligemma_jax.sharding.mesh import resolve_mesh

    B, T, N, H = 4, 20, 4, 16
    mesh = resolve_mesh("data=2,fsdp=2,tensor=2", small_config("pg2"))
    valid = jnp.arange(T) >= jnp.arange(B)[:, None]
    span = token_span(valid, valid & (jnp.arange(T) < 12), 1)

    def loss(form: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = Mask(span, span, 2**30)
        out = attend(q, k, v, scale=0.3, softcap=50.0, mask=mask, form=form)
        return jnp.sum(jnp.where(valid[..., None, None], out, 0) ** 2)

    results = {}
    for K in key_heads:
        keys = jax.random.split(jax.random.key(K), 3)
        shapes = [(B, T, heads, H) for heads in (N, K, K)]
        arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        run = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
        plain = run("plain", *arrays)
        with use_mesh(mesh):
            fused = run("fused", *arrays)
        errors = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), *(plain, fused)
        )
        results[str(K)] = jax.tree.leaves(errors)
    return results


def _compute(
    config: PaliGemmaConfig, layers: str, train: str, quantize: str | None, mesh: Mesh | None
) -> dict:
    """Logits, tokens and a training step, with dropout, of a random model on a mesh."""
    import jax
    import numpy as np

    from paligemma_jax.checkpoints.synthetic import random_model
    from paligemma_jax.inference import scoring
    from paligemma_jax.inference.generate import generate
    from paligemma_jax.inference.options import DecodingOptions
    from paligemma_jax.model.tree import parameters, with_parameters
    from paligemma_jax.sharding.arrays import distribute, shard_batch
    from paligemma_jax.training.batches import max_targets
    from paligemma_jax.training.config import FinetuneConfig
    from paligemma_jax.training.prepare import prepare_model
    from paligemma_jax.training.trainer import Trainer

    options = FinetuneConfig(
        data="",
        output="",
        train=train,
        quantize=quantize,
        layers=layers,
        warmup=0,
        clip=0,
        learning_rate=1.0,
        optimizer="sgd",
        lora_rank=2,
        dropout=0.2,
    )
    rng = np.random.default_rng(0)

    def add_noise(model: PaliGemma, pattern: str) -> PaliGemma:
        values = {
            path: a + rng.normal(0, 0.1, a.shape).astype("f") if re.search(pattern, path) else a
            for path, a in sorted(parameters(model).items())
        }
        return with_parameters(model, values.__getitem__)

    model = prepare_model(add_noise(random_model(config), ""), options)
    model = distribute(add_noise(model, "lora_b"), mesh)
    batch = make_batch(config, 8)
    logits = np.asarray(scoring.forward(model, batch.inputs))
    prompts = replace(batch.inputs, valid=batch.inputs.prefix)
    slots = prompts.tokens.shape[1] + 6
    tokens = generate(model, prompts, DecodingOptions(6), slots=slots).tokens
    trainer = Trainer(model, options, 10)
    state = trainer.start()
    before = {path: np.array(value) for path, value in state.trainable.items()}
    shardings = [a.sharding for a in jax.tree.leaves(state)]
    longest = max_targets(batch)
    state, report = trainer.step(
        state, trainer.frozen, shard_batch(batch, mesh), max_targets=longest
    )
    moved = sum(
        not a.sharding.is_equivalent_to(sharding, a.ndim)
        for a, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
    )
    arrays = jax.tree.leaves((state.trainable, state.optimizer))
    largest_shards = [max(shard.data.nbytes for shard in a.addressable_shards) for a in arrays]
    return {
        "logits": logits,
        "tokens": tokens,
        "loss": np.asarray(report["loss"]),
        "gradients": {
            path: before[path] - np.asarray(value) for path, value in state.trainable.items()
        },
        "moved": moved,
        "share": sum(largest_shards) / sum(a.nbytes for a in arrays),
    }


def compile_step(
    config: PaliGemmaConfig, mesh: Mesh, rows: int, **options: object
) -> jax.stages.Compiled:
    """Compile a training step from shapes."""
    from paligemma_jax.checkpoints.load import abstract_model
    from paligemma_jax.sharding.arrays import batch_shapes, sharded_shapes
    from paligemma_jax.training.config import FinetuneConfig
    from paligemma_jax.training.prepare import trainer_shapes

    finetune = FinetuneConfig("", "", batch_size=rows, **options)
    trainer, state, frozen = trainer_shapes(abstract_model(config), finetune)
    state, frozen = sharded_shapes((state, frozen), mesh)
    batch = batch_shapes(make_batch(config, rows), mesh)
    return trainer.step.lower(state, frozen, batch, max_targets=8).compile()


def collectives(mesh: str, rows: int, **options: object) -> list[list]:
    """Return [opcode, shapes of the results, operation name, dtypes] of every collective of a step,
    for 3 stacked layers and a vocabulary of two chunks."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    config = small_config("pg2", layers=3)
    config = replace(config, decoder=replace(config.decoder, vocab_size=2**16))
    program = compile_step(config, resolve_mesh(mesh, config), rows, remat="full", **options)
    opcodes = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    results = []
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({opcodes})(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = [[int(size) for size in sizes.split(",") if size] for _, sizes in arrays]
            name = re.search(r'op_name="([^"]*)"', line)
            dtypes = [dtype for dtype, _ in arrays]
            results.append([match[2], shapes, name[1] if name else "", dtypes])
    return results


def group_errors(mesh: str) -> dict:
    """Sample groups and compute their loss and its gradient on a mesh and on one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from paligemma_jax.inference.loading import load
    from paligemma_jax.reinforcement.groups import sample_groups
    from paligemma_jax.reinforcement.grpo import grpo_loss
    from paligemma_jax.reinforcement.rollouts import score_groups
    from paligemma_jax.sharding.arrays import distribute, shard_batch, to_host
    from paligemma_jax.sharding.compiled import mesh_jit
    from paligemma_jax.sharding.mesh import resolve_mesh

    predictor = load("tiny", dtype="float32")
    processor, rng = predictor.processor, np.random.default_rng(0)
    images = [rng.integers(0, 255, (56, 56, 3), np.uint8) for _ in range(4)]
    prompts, pixels = processor.encode(images, ["ocr"] * 4), processor.pixel_values(images)[:, None]
    gradient = mesh_jit(jax.value_and_grad(lambda *a: jnp.divide(*grpo_loss(*a, 0.2, 0.1))))
    results = []
    for name in (None, mesh):
        devices = resolve_mesh(name, predictor.config)
        model = distribute(predictor.model, devices)
        groups, answers = sample_groups(model, processor, prompts, pixels, 4, 8, np.arange(4))
        scored, mask = map(to_host, score_groups(model, groups))
        ratio = np.abs(np.exp(scored - groups.log_probabilities) - 1).max()
        groups = replace(groups, advantages=np.linspace(-1, 1, 16, dtype=np.float32))
        groups = replace(groups, reference=scored - 0.1 * mask)
        loss, gradients = gradient(model, shard_batch(groups, devices))
        leaves = [np.asarray(to_host(x)) for x in jax.tree.leaves(gradients)]
        results.append((answers, ratio, float(loss), leaves))
    (ours, *_, loss, leaves), (theirs, ratio, other, others) = results
    errors = [
        np.abs(a - b).max() / max(1, np.abs(a).max()) for a, b in zip(leaves, others, strict=True)
    ]
    return {
        "same_tokens": ours == theirs,
        "ratio": float(ratio),
        "loss": abs(loss - other),
        "gradients": float(max(errors)),
    }


def auto_meshes(cases: list[tuple]) -> list[dict]:
    """Return the mesh that "auto" makes for each (kind, training, rows)."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    return [
        dict(resolve_mesh("auto", small_config(kind), training, rows=rows).shape)
        for kind, training, rows in cases
    ]


def step_flops(cases: list[tuple[str, int]]) -> list[float]:
    """Return XLA's FLOPs on one device of a training step, for each (mesh, rows)."""
    from paligemma_jax.sharding.mesh import resolve_mesh

    config = small_config("pg2")
    return [
        compile_step(config, resolve_mesh(mesh, config), rows, layers="list").cost_analysis()[
            "flops"
        ]
        for mesh, rows in cases
    ]


def compare_loading(directory: str, quantize: str | None = None) -> dict:
    """Load a checkpoint on one and on eight devices. Return the paths of parameters that are not
    equal to the bit, and of those that are sharded."""
    import numpy as np

    from paligemma_jax.checkpoints.load import load_model
    from paligemma_jax.model.tree import parameters

    single = parameters(load_model(Path(directory), quantize=quantize))
    mesh = "data=1,fsdp=2,tensor=4"
    loaded = parameters(load_model(Path(directory), mesh=mesh, quantize=quantize))

    def equal(path: str) -> bool:
        same_values = (np.asarray(loaded[path]) == np.asarray(single[path])).all()
        return loaded[path].dtype == single[path].dtype and same_values

    return {
        "different": [path for path in loaded if not equal(path)],
        "sharded": [p for p, value in loaded.items() if not value.sharding.is_fully_replicated],
    }


def run_commands(commands: list[list[str]]) -> list[str]:
    """Return what `paligemma-jax` prints for each list of arguments, errors included."""
    from paligemma_jax.cli import main

    outputs = []
    for sys.argv in (["paligemma-jax", *arguments] for arguments in commands):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), suppress(SystemExit):
            main()
        outputs.append(out.getvalue())
    return outputs


def predict_batch_sizes(arguments: list[str]) -> list[int]:
    """Run `paligemma-jax predict`. Return the sizes of the batches that the model gets."""
    from paligemma_jax.inference import generate

    sizes, prefill = [], generate.prefill

    def recording_prefill(model: PaliGemma, inputs: Inputs, *args: object, **kwargs: object):
        sizes.append(len(inputs.tokens))
        return prefill(model, inputs, *args, **kwargs)

    generate.prefill = recording_prefill
    run_commands([["predict", *arguments]])
    return sizes


def constrained_answers(image: str) -> list[str]:
    """Answers that follow a grammar, on a mesh of all devices."""
    import paligemma_jax as pg
    from paligemma_jax.grammars.grammar import Boxes

    predictor = pg.load("tiny", mesh="data=2,tensor=2")
    options: dict = dict(allowed=Boxes(["4", "3"], 1), max_new_tokens=20)
    return predictor.generate([image] * 4, ["detect 4 ; 3"] * 4, **options)


def edited_results(mesh: str) -> list[float]:
    """tests/interpretability/test_edits.py `edited_results` on a mesh."""
    from interpretability.test_edits import edited_results

    import paligemma_jax as pg

    return edited_results(pg.load("tiny", mesh=mesh))


def late_interaction_of_rows() -> list[float]:
    """tests/losses/test_losses.py: a loss and its gradient, one row on each device."""
    import jax
    import numpy as np
    from losses.test_losses import eight_pairs, late_interaction_and_gradient

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return late_interaction_and_gradient([jax.device_put(x, rows) for x in eight_pairs()])


if __name__ == "__main__":
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    arguments, options = json.loads(sys.argv[2])
    module, _, name = sys.argv[1].rpartition(".")
    functions = vars(importlib.import_module(module)) if module else globals()
    print(json.dumps(functions[name](*arguments, **options)))
