"""Stack the layers of a loaded model, of which some may have adapters beside quantized weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from paligemma_jax.lora import LoRALinear
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import modules, replace_modules
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.mesh import mesh_of

_Layer = LoRALinear | Linear | QuantizedLinear


def stack_loaded(model: PaliGemma) -> PaliGemma:
    """Stack the layers of a model that `load_model` returned, and free the list's arrays. Adapters
    of some layers become adapters of all."""
    mesh = mesh_of(model)
    return distribute(stack_model(distribute(_with_equal_adapters(model), mesh)), mesh)


def _with_equal_adapters(model: PaliGemma) -> PaliGemma:
    """Give the linear layers of one name adapters of one form, if any has one. The model computes
    the same."""
    groups: dict[str, dict[str, _Layer]] = defaultdict(dict)
    for path, module in modules(model, (LoRALinear, Linear, QuantizedLinear)).items():
        groups[re.sub(r"/layers/\d+/", "/layers/*/", path)][path] = module
    equal: dict[str, nnx.Module] = {}
    for group in groups.values():
        forms = {_form(module) for module in group.values()}
        if len(forms) > 1:
            rank = max(module.lora_a.shape[0] for module in _adapted(group.values()))
            has_magnitude = any(m.lora_magnitude is not None for m in _adapted(group.values()))
            equal |= {p: _adapter(module, rank, has_magnitude) for p, module in group.items()}
    return replace_modules(model, lambda path, _: equal.get(path))


def _adapted(layers: Iterable[_Layer]) -> list[LoRALinear]:
    return [layer for layer in layers if isinstance(layer, LoRALinear)]


def _form(module: _Layer) -> tuple[int, float, bool] | None:
    """Rank, scale, and whether there is a magnitude; None without an adapter."""
    if not isinstance(module, LoRALinear):
        return None
    return module.lora_a.shape[0], module.scale, module.lora_magnitude is not None


def _adapter(module: _Layer, rank: int, has_magnitude: bool) -> LoRALinear:
    """The same layer with an adapter of this rank and of scale 1, padded with zeros."""
    if isinstance(module, LoRALinear):
        base, a, b = module.base, module.lora_a[...], module.lora_b[...] * module.scale
        magnitude, lengths = module.lora_magnitude, module.lengths
    else:
        base, magnitude, lengths = module, None, None
        a = jnp.zeros((0, *base.shape[-base.contracted :]))
        b = jnp.zeros((*base.shape[: -base.contracted], 0))
    missing = rank - len(a)
    a = jnp.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)])
    b = jnp.pad(b, [*[(0, 0)] * (b.ndim - 1), (0, missing)])
    if not has_magnitude:
        return LoRALinear(base, a, b, 1.0)

    def rows(values: nnx.Param | nnx.Variable | None) -> Array:
        """Of a layer without a magnitude, the ratio of magnitude and length must be 1."""
        return jnp.ones(b.shape[:-1]) if values is None else values[...]

    return LoRALinear(base, a, b, 1.0, magnitude=rows(magnitude), lengths=rows(lengths))
