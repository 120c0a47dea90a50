"""Programs on meshes that users make, for `on_devices.call`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jax.sharding import Mesh


def own_mesh() -> Mesh:
    """A mesh of eight devices with other axis names, two of which split the rows."""
    import jax

    from paligemma_jax.sharding.axes import rename_axes

    mesh = jax.make_mesh((2, 2, 2), ("replica", "model", "batch"))
    return rename_axes(mesh, {"replica": "data", "batch": "data", "model": "tensor"})


def logits_on_own_meshes() -> dict[str, float]:
    """The largest difference of tiny's logits on each mesh from those without a mesh."""
    import jax
    from jax.sharding import AxisType

    import paligemma_jax as pg

    image = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)

    def logits(mesh: Mesh | None) -> np.ndarray:
        predictor = pg.load("tiny", dtype="float32", mesh=mesh)
        values, inputs = predictor.logits([image] * 4, ["ocr", "caption en", "count", "ocr"])
        return np.where(inputs.valid[..., None], values, 0)

    explicit = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    single = logits(None)
    scale = np.abs(single).max()
    meshes = {"explicit": explicit, "own names": own_mesh()}
    return {
        name: float(np.abs(logits(mesh) - single).max() / scale) for name, mesh in meshes.items()
    }


def gradient_shardings(meshes: list[str]) -> dict[str, list[str]]:
    """For each mesh, the parameters of tiny whose gradient has another sharding, and those that are
    split; then the number of programs that three training steps compile."""
    import jax
    import jax.numpy as jnp
    import optax

    import paligemma_jax as pg
    from paligemma_jax.model.tree import parameters
    from paligemma_jax.sharding.arrays import shard_batch
    from paligemma_jax.sharding.compiled import constrain_tree, mesh_jit
    from paligemma_jax.sharding.mesh import mesh_of
    from paligemma_jax.training.losses import answer_loss

    optimizer = optax.adam(1e-4)

    def loss(model: object, inputs: object) -> jax.Array:
        total, count = answer_loss(model, inputs, jnp.ones(4), max_targets=16)
        return total / count

    @mesh_jit
    def step(model: object, state: object, inputs: object) -> tuple:
        _, gradient = jax.value_and_grad(loss)(model, inputs)
        gradient = constrain_tree(gradient)
        updates, state = optimizer.update(gradient, state, model)
        return *constrain_tree((optax.apply_updates(model, updates), state)), gradient

    image = np.zeros((56, 56, 3), np.uint8)
    results = {}
    for name in meshes:
        predictor = pg.load("tiny", layers="stack", mesh=own_mesh() if name == "own" else name)
        model, before = predictor.model, parameters(predictor.model)
        inputs = predictor.processor([image] * 4, ["ocr"] * 4, ["4 3"] * 4, padding_side="right")
        inputs = shard_batch(inputs, mesh_of(model))
        state = mesh_jit(lambda model: constrain_tree(optimizer.init(model)))(model)
        programs = step._cache_size()
        for _ in range(3):
            model, state, gradient = step(model, state, inputs)
        found, after = parameters(gradient), parameters(model)
        results[name] = {
            "moved": [
                path
                for path, value in before.items()
                if {found[path].sharding, after[path].sharding} != {value.sharding}
            ],
            "split": sum(not value.sharding.is_fully_replicated for value in before.values()),
            "programs": step._cache_size() - programs,
        }
    return results


def refusals(meshes: list[object]) -> list[list[str]]:
    """The errors of functions that take a mesh, for each of these values. Arguments are checked by
    the functions only: this process checks no annotations."""
    from paligemma_jax.model.config import PaliGemmaConfig
    from paligemma_jax.sharding.arrays import distribute, shard_batch
    from paligemma_jax.sharding.mesh import resolve_mesh
    from paligemma_jax.sharding.rules import shardings

    def error(function: Callable, *arguments: object) -> str:
        try:
            return repr(function(*arguments))
        except ValueError as error:
            return str(error)

    config, tree = PaliGemmaConfig.preset("3b-224"), {"a": np.ones(2)}
    return [
        [error(resolve_mesh, mesh, config)]
        + [error(function, tree, mesh) for function in (distribute, shard_batch, shardings)]
        for mesh in meshes
    ]


def interrupted_run(data: str, output: str) -> str:
    """Fine-tune on eight devices, of a mesh of one's own, until step 1 of 2."""
    from support.finetuning import small_config

    import paligemma_jax as pg

    def interrupt(event: pg.StepEvent) -> None:
        if event.step == 1:
            raise RuntimeError("interrupted")

    options = dict(train="projector", steps=2, learning_rate=1e-3)
    try:
        pg.finetune(small_config(data, output, mesh=own_mesh(), **options), callbacks=[interrupt])
    except RuntimeError as error:
        return str(error)
    return ""


def engine_answers(count: int = 10) -> list[str]:
    """The texts of requests to an engine with adapters, a fifth with a grammar, on all devices."""
    import jax
    from support.engines import run
    from support.tiny_adapters import save_adapters

    import paligemma_jax as pg
    from paligemma_jax.checkpoints.source import TINY
    from paligemma_jax.inference.engine import Engine
    from paligemma_jax.inference.options import DecodingOptions

    mesh = "data=2,fsdp=2,tensor=2" if jax.device_count() == 8 else None
    predictor = pg.load("tiny", mesh=mesh)
    directories = save_adapters(predictor.model, Path(tempfile.mkdtemp()))
    names = [None, *directories]
    tasks = ["ocr", "detect 3", "caption en", "segment 2", "answer en how many digits?"]
    prompts = predictor.processor.encode(
        [str(TINY.parent / "digits.jpg")] * count, tasks * (count // 5)
    )
    requests = []
    for seed, prompt in enumerate(prompts):
        allowed = pg.Boxes(["4", "3"], least=1) if tasks[seed % 5] == "detect 3" else None
        sampler = pg.Greedy() if seed % 2 else pg.Sample()
        options = DecodingOptions(8 + 3 * (seed % 10), sampler, allowed=allowed)
        requests.append((prompt, options, seed, names[seed % len(names)]))
    with Engine(predictor.model, predictor.processor, 4, 160, adapters=directories) as engine:
        return [answer.text for answer in run(engine, [requests])]
