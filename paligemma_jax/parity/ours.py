"""This model stage by stage, its layers read from the checkpoint as they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint
from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import collect_stages, stage
from paligemma_jax.model.tree import with_parameters
from paligemma_jax.processing.processor import Inputs

Arrays = Mapping[str, np.ndarray]


class Streamed(Sequence):
    """The layers of a tower, each of which is read when it is called, is compiled by itself, and is dropped: `fold` runs them as a list."""

    def __init__(self, tower: str, layers: Any, read: Callable[[str], Any], attention: bool, fed: Arrays):
        self.tower, self.layers, self.read, self.attention, self.fed = tower, layers, read, attention, fed

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        return partial(self._call, range(len(self))[i])

    def _call(self, i: int, x: jax.Array, *args: Any) -> Any:
        place = f"{self.tower}/layers/{i}/"
        layer = with_parameters(self.layers[i], lambda path: self.read(place + path))
        fed = {name.removeprefix(place): value for name, value in self.fed.items() if name.startswith(place)}
        out, found = run_layer(layer, x, args, fed, self.attention)
        for name, value in found.items():
            stage(name, value)
        return out


@partial(jax.jit, static_argnames="attention")
def run_layer(layer: Any, x: jax.Array, args: tuple, fed: Arrays, attention: bool) -> tuple[Any, dict[str, jax.Array]]:
    with collect_stages(attention, branches=True, fed=fed) as found:
        out = layer(x, *args)
    return out, found


@jax.jit
def run_module(module: Any, x: jax.Array) -> jax.Array:
    """One that is in no layer, compiled as well: in bfloat16 it then rounds as often as where the model is used."""
    return module(x)


def build(checkpoint: Checkpoint, dtype: str) -> tuple[PaliGemma, Callable[[str], jax.Array]]:
    """The model with what is no layer in memory, and how to read a parameter."""
    # Waited for: else the file's numbers, their copy and what becomes of it are all in memory, of the table 2.4 GB each.
    read = lambda path: jax.block_until_ready(jnp.asarray(checkpoint.tensors[path].load(), dtype))
    model = abstract_model(replace(checkpoint.config, dtype=dtype))
    return with_parameters(model, lambda path: checkpoint.tensors[path] if "/layers/" in path else read(path)), read


def stages(model: PaliGemma, read: Callable[[str], Any], inputs: Inputs, attention: bool, fed: Arrays | None = None) -> dict[str, np.ndarray]:
    """Every stage's output in float32, in order of computation; `fed` as in `collect`."""
    fed = fed or {}
    model = jax.tree.map(lambda leaf: leaf, model)
    for tower in ("vision", "decoder"):
        vars(getattr(model, tower))["layers"] = Streamed(tower, getattr(model, tower).layers, read, attention, fed)
    for parent, name in ((model.vision, "patch"), (model.vision, "norm"), (model, "projector"), (model.decoder, "norm")):
        vars(parent)[name] = partial(run_module, getattr(parent, name))
    inputs = jax.tree.map(jnp.asarray, inputs)
    with collect_stages(attention, branches=True, fed=fed) as found:
        model(inputs.tokens, inputs.images if len(inputs.images) else None, inputs.valid, inputs.prefix)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}
