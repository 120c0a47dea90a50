"""Run a tower's layers, as a list or stacked, and choose what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from paligemma_jax.model.constrain import constrain
from paligemma_jax.model.stages import collecting, scope, stage
from paligemma_jax.model.tree import Model, copy_tree

policies = jax.checkpoint_policies
# The result of fused attention, and what attention and MLP return: little memory, and otherwise the
# backward pass repeats the kernel and the last product of each.
OUTPUTS = policies.save_only_these_names("attention", "sublayer")
REMAT_POLICIES = {
    "full": policies.nothing_saveable,
    "outputs": OUTPUTS,
    "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, OUTPUTS),
}
_policy: ContextVar[Callable[..., bool] | None] = ContextVar("remat_policy", default=None)


def scan_layers(
    block: Callable[..., tuple[Array, Any]], x: Array, layers: PyTree, *per_layer: PyTree
) -> tuple[Array, Any]:
    """Run `x, y = block(layer, x, *values)` through all layers.

    Args:
        block: One layer's computation.
        x: [B, T, D] activations.
        layers: A sequence, such as an `nnx.List` (a Python loop), or one block with a leading layer
            axis (`stack_layers`; one `jax.lax.scan`).
        per_layer: Further arguments, one value for each layer: sequences, or arrays with a leading
            layer axis.

    Returns:
        The last x, and the y of every layer: a list, or arrays with a leading layer axis.
    """
    x = constrain("B T", x)
    policy = _policy.get()
    if policy is not None and not collecting():  # stages are outputs: nothing is left to recompute
        block = jax.checkpoint(block, policy=policy)
    is_stack = not isinstance(layers, Sequence)
    if is_stack:
        if not collecting():

            def step(x: Array, layer: tuple) -> tuple[Array, Any]:
                x, y = block(layer[0], x, *layer[1:])
                return constrain("B T", x), y

            return jax.lax.scan(step, x, (layers, *per_layer))
        layers, per_layer = unstack_layers(layers), tuple(map(unstack_layers, per_layer))
    ys = []
    for i, layer in enumerate(layers):
        with scope(f"layers/{i}"):
            x, y = block(layer, x, *(values[i] for values in per_layer))
            x = stage("", constrain("B T", x))
        ys.append(y)
    return x, stack_layers(ys) if is_stack else ys


@contextmanager
def remat(policy: str) -> Iterator[None]:
    """Set the rematerialization policy of `scan_layers` while tracing inside: what the backward
    pass recomputes. "none", "full" (everything), "outputs" (all but the outputs of attention and
    MLP), or "dots" (all but products with weights)."""
    token = _policy.set(REMAT_POLICIES.get(policy))
    try:
        yield
    finally:
        _policy.reset(token)


def stack_layers(layers: Sequence[PyTree]) -> PyTree:
    """One block whose arrays have a leading layer axis. Compile time no longer grows with depth."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def unstack_layers(layers: PyTree) -> nnx.List:
    """The inverse of `stack_layers`."""
    depth = len(jax.tree.leaves(layers)[0])
    return nnx.List([jax.tree.map(lambda a, i=i: a[i], layers) for i in range(depth)])


def stack_model(model: Model, delete: bool = True) -> Model:
    """The model with the layers of both towers stacked. With `delete`, the arrays of the list are
    freed tower by tower, which keeps peak memory close to one copy of the weights.

    Raises:
        ValueError: The layers of a tower have other modules or shapes than its first.
    """
    model = copy_tree(model)
    for name in ("vision", "decoder"):
        tower = getattr(model, name)
        forms = [_form(layer) for layer in tower.layers]
        for i, form in enumerate(forms):
            if form != forms[0]:
                raise ValueError(
                    f"layers to stack must be alike, but layer {i} of {name} has other modules or "
                    "shapes than layer 0: use a list of layers"
                )
        layers, tower.layers = tower.layers, stack_layers(tower.layers)
        if delete:
            jax.block_until_ready(tower.layers)
            jax.tree.map(lambda array: array.delete(), layers)
    return model


def _form(layer: PyTree) -> tuple[PyTree, list[tuple[int, ...]]]:
    """The modules of a layer, and the shapes of its arrays."""
    leaves, structure = jax.tree.flatten(layer)
    return structure, [leaf.shape for leaf in leaves]


def unstack_model(model: Model) -> Model:
    """The inverse of `stack_model`; the stacked arrays are kept."""
    model = copy_tree(model)
    for tower in (model.vision, model.decoder):  # type: ignore[attr-defined]
        tower.layers = unstack_layers(tower.layers)
    return model
