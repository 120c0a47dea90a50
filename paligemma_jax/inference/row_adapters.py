"""Several LoRA adapters over one base, another one in each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int, PyTree

from convert.adapter import Factors
from paligemma_jax.model.constrain import gather_weight
from paligemma_jax.model.layers import Linear, product
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import replace_modules
from paligemma_jax.processing.processor import AnyArray
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.compiled import Flattened
from paligemma_jax.sharding.mesh import mesh_of


class RowLoRALinear(nnx.Module):
    """base(x) + B A x, with the A and B of one of several adapters in each row of a batch.

    The factors of all adapters are joined along the rank: those of ranks 2 and 4 are one of rank 6.
    Between A and B, each row keeps the part of its adapter. So a factor is read once, however many
    rows use it, ranks may differ, and rows of the base add 0.

    Args:
        base: The layer to adapt.
        a: float[*lead, R, in...]; lead is the layer axis of a stack, if any.
        b: float[*lead, out..., R], scaled.
        owners: The number of the adapter of each of the R, from 1.
        rows: int32[*lead, B], the number of the adapter of each row of x [B, T, in...], 0 for the
            base; int32[*lead] for the same in all rows; None for the base in all rows.
    """

    def __init__(
        self,
        base: Linear | QuantizedLinear,
        a: Array,
        b: Array,
        owners: tuple[int, ...],
        rows: Array | None = None,
    ):
        self.base, self.owners = base, owners
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        self.rows = None if rows is None else nnx.Variable(rows)

    def __call__(self, x: Array) -> Array:
        y = self.base(x)
        if self.rows is None:
            return y
        axes, contracted = self.base.axes, self.base.contracted
        a = gather_weight("R" + axes[-contracted:], self.lora_a[...].astype(x.dtype))
        b = gather_weight(axes[:-contracted] + "R", self.lora_b[...].astype(x.dtype))
        own = self.rows[...][..., None, None] == jnp.array(self.owners)
        return y + product(jnp.where(own, product(x, a, contracted), 0), b, 1)

    def for_rows(self, rows: Int[Array, "*B"]) -> RowLoRALinear:
        rows = jnp.broadcast_to(rows, (*self.base.lead, *rows.shape))
        return RowLoRALinear(self.base, self.lora_a[...], self.lora_b[...], self.owners, rows)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class FlattenedForRows(Flattened):
    """A model of `add_adapters`, and the numbers of the adapters in the rows of its next batch. To
    choose others changes one argument of a program, which is not compiled again."""

    rows: Int[AnyArray, "*B"]

    def tree_flatten(self) -> tuple[Sequence[PyTree], PyTree]:
        return (self.leaves, self.rows), self.structure

    @classmethod
    def tree_unflatten(cls, structure: PyTree, leaves: Sequence[PyTree]) -> FlattenedForRows:
        return cls(leaves[0], structure, leaves[1])

    def restore(self) -> PyTree:
        rows = jnp.asarray(self.rows)

        def choose(path: str, module: nnx.Module) -> RowLoRALinear | None:
            return module.for_rows(rows) if isinstance(module, RowLoRALinear) else None

        return replace_modules(super().restore(), choose)


def add_adapters(model: PaliGemma, adapters: Mapping[str, Mapping[str, Factors]]) -> PaliGemma:
    """Put adapters beside the linear layers of a base, whose layers are a list or stacked. They are
    numbered from 1, in the dtype of the activations; the model's output does not change yet.

    Args:
        adapters: By name, the factors by the path of each layer in a list.

    Raises:
        ValueError: The model has no such layer, or one of another shape; or numbers are not finite
            in the dtype.
    """
    dtype = model.config.activation_dtype
    unused = {name: set(factors) for name, factors in adapters.items()}

    def wrap(path: str, module: nnx.Module) -> RowLoRALinear | None:
        if not isinstance(module, Linear | QuantizedLinear):
            return None
        paths = [path]
        if module.lead:
            paths = [path.replace("/layers/", f"/layers/{i}/") for i in range(module.lead[0])]
        parts, owners = [], []
        for number, (name, factors) in enumerate(adapters.items(), 1):
            found = [factors.get(path) for path in paths]
            unused[name] -= {*paths}
            if any(found):
                parts.append(_join_layers(name, path, module, found, dtype))
                owners += [number] * parts[-1][1].shape[-1]
        if not owners:
            return None
        a, b = zip(*parts, strict=True)
        joined = np.concatenate(a, axis=1), np.concatenate(b, axis=-1)
        a, b = (jnp.asarray(x if module.lead else x[0]) for x in joined)
        return RowLoRALinear(module, a, b, tuple(owners))

    adapted = replace_modules(model, wrap)
    for name, paths in unused.items():
        if paths:
            raise ValueError(
                f"the adapter {name!r} adapts {min(paths)}, but the model has no linear layer "
                "there: give the base of the adapter, without other adapters"
            )
    return distribute(adapted, mesh_of(model))


def _join_layers(
    name: str,
    path: str,
    module: Linear | QuantizedLinear,
    layers: Sequence[Factors | None],
    dtype: DTypeLike,
) -> tuple[np.ndarray, np.ndarray]:
    """The factors [L, R, in...] and [L, out..., R] of some layers, padded with zeros to the largest
    rank. They are checked."""
    inputs, outputs = module.shape[-module.contracted :], module.shape[: -module.contracted]
    rank = max(f.rank for f in layers if f)
    a = np.zeros((len(layers), rank, *inputs), np.float32)
    b = np.zeros((len(layers), *outputs, rank), np.float32)
    for i, f in enumerate(layers):
        if f is None:
            continue
        if f.a.shape != (f.rank, *inputs) or f.b.shape != (*outputs, f.rank):
            raise ValueError(
                f"the adapter {name!r} must have factors of {list(inputs)} to {list(outputs)} for "
                f"{path}, got {list(f.a.shape[1:])} to {list(f.b.shape[:-1])}: it is of another "
                "base"
            )
        a[i, : f.rank], b[i, ..., : f.rank] = f.a, f.b * np.float32(f.scale)
    with np.errstate(over="ignore"):
        a, b = a.astype(dtype), b.astype(dtype)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # would spread to the other rows
        raise ValueError(
            f"the adapter {name!r} must have finite factors in {jnp.dtype(dtype).name} for {path}"
        )
    return a, b
