"""Run this model stage by stage, reading each layer's weights when it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from convert.checkpoint import Checkpoint
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.model.layers import full_dtype
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import collect_stages, stage
from paligemma_jax.model.tree import copy_tree, with_parameters
from paligemma_jax.processing.processor import Inputs

Arrays = Mapping[str, np.ndarray]
ReadParameter = Callable[[str], Array]


class StreamedLayers(Sequence):
    """The layers of a tower, for `scan_layers`: each is read when called, compiled on its own, and
    freed afterwards."""

    def __init__(
        self, tower: str, layers: nnx.List, read: ReadParameter, attention: bool, fed: Arrays
    ):
        self.tower, self.layers, self.read = tower, layers, read
        self.attention, self.fed = attention, fed

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Callable:  # type: ignore[override]
        return partial(self._call, range(len(self))[index])

    def _call(self, index: int, x: Array, *args: PyTree) -> PyTree:
        prefix = f"{self.tower}/layers/{index}/"
        layer = with_parameters(self.layers[index], lambda path: self.read(prefix + path))
        fed = {
            name.removeprefix(prefix): value
            for name, value in self.fed.items()
            if name.startswith(prefix)
        }
        result, stages = run_layer(layer, x, args, fed, self.attention)
        for name, value in stages.items():
            stage(name, value)
        return result


@partial(jax.jit, static_argnames="attention")
def run_layer(
    layer: Callable, x: Array, args: tuple, fed: Arrays, attention: bool
) -> tuple[PyTree, dict[str, Array]]:
    with collect_stages(attention, branches=True, fed=fed) as stages:
        result = layer(x, *args)
    return result, stages


@jax.jit
def run_module(module: Callable, x: Array) -> Array:
    """Call a module outside the layers. Compiled, so that in bfloat16 it rounds as often as in
    the compiled model."""
    return module(x)


def build_model(checkpoint: Checkpoint, dtype: str) -> tuple[PaliGemma, ReadParameter]:
    """The model with everything but its layers in memory, and a function to read a parameter."""

    def read(path: str) -> Array:
        # Wait for the copy: otherwise the array from the file, its copy and the cast of that are
        # in memory at once, 2.4 GB each for the embedding table.
        return jax.block_until_ready(jnp.asarray(checkpoint.tensors[path].load(), dtype))

    def read_or_defer(path: str):
        return checkpoint.tensors[path] if "/layers/" in path else read(path)

    model = abstract_model(replace(checkpoint.config, dtype=dtype))
    return with_parameters(model, read_or_defer), read


def compute_stages(
    model: PaliGemma,
    read: ReadParameter,
    inputs: Inputs,
    attention: bool,
    fed: Arrays | None = None,
) -> dict[str, np.ndarray]:
    """Every stage's output as float32, or as float64 of a model in float64, in order of
    computation. `attention` and `fed` are as in `collect_stages`."""
    fed = fed or {}
    model = copy_tree(model)
    for name in ("vision", "decoder"):
        tower = getattr(model, name)
        # Assigned through `vars`: nnx refuses attributes that are neither modules nor arrays.
        vars(tower)["layers"] = StreamedLayers(name, tower.layers, read, attention, fed)
    vision, decoder = model.vision, model.decoder
    for parent, name in (
        (vision, "patch"),
        (vision, "norm"),
        (model, "projector"),
        (decoder, "norm"),
    ):
        vars(parent)[name] = partial(run_module, getattr(parent, name))
    inputs = jax.tree.map(jnp.asarray, inputs)
    with collect_stages(attention, branches=True, fed=fed) as stages:
        model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    return {name: np.asarray(value, full_dtype(value.dtype)) for name, value in stages.items()}
