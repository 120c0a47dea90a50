"""Low-rank adaptation (arXiv:2106.09685): a `LoRALinear` wraps a `Linear` or `QuantizedLinear`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from convert.adapter import Factors
from paligemma_jax.model.constrain import gather_weight
from paligemma_jax.model.layers import Linear, product
from paligemma_jax.model.low_rank import adapted_product
from paligemma_jax.model.patterns import matches, unmatched
from paligemma_jax.model.tree import Leaf, Model, modules, replace_modules
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.sharding.arrays import to_host

TARGET = r".*(attention|mlp)/\w+"  # the projections of all layers


class LoRALinear(nnx.Module):
    """base(x) + scale * B A x, or, with a magnitude, DoRA (arXiv:2402.09353): the rows of
    W + scale * B A are scaled to that length.

    As in peft, no gradient flows through the present length of the rows, and dropout applies to all
    that is added to base(x).

    Args:
        base: The layer to adapt.
        a: float32[*lead, R, in...]; lead is the layer axis of a stack, if any.
        b: float32[*lead, out..., R]
        scale: alpha / R, or alpha / sqrt(R).
        dropout: Dropout rate of the input of A, inside `lora_dropout`.
        seed: uint32[*lead], distinguishes the dropout of the layers.
        magnitude: float32[*lead, out...], of DoRA.
        lengths: float32[*lead, out...], `row_lengths` if they do not change; None computes them in
            every call.
    """

    def __init__(
        self,
        base: Linear | QuantizedLinear,
        a: Array,
        b: Array,
        scale: float,
        dropout: float = 0.0,
        seed: Array | None = None,
        magnitude: Array | None = None,
        lengths: Array | None = None,
    ):
        self.base, self.scale, self.dropout = base, scale, dropout
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        self.seed = None if seed is None else nnx.Variable(seed)
        self.lora_magnitude = None if magnitude is None else nnx.Param(magnitude)
        self.lengths = None if lengths is None else nnx.Variable(lengths)

    @classmethod
    def create(
        cls,
        base: Linear | QuantizedLinear,
        rank: int,
        scale: float,
        dropout: float,
        seed: int,
        layer_seed: int,
        dora: bool = False,
    ) -> LoRALinear:
        """An adapter that changes nothing yet: B is 0, A uniform in +-1/sqrt(fan_in) as in peft,
        and the magnitude of DoRA is the length of each row of W."""
        outputs, inputs = base.shape[: -base.contracted], base.shape[-base.contracted :]
        bound = math.prod(inputs) ** -0.5
        key = jax.random.fold_in(jax.random.key(seed), layer_seed)
        shape = (*base.lead, rank, *inputs)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*base.lead, *outputs, rank))
        layers = np.arange(math.prod(base.lead)).reshape(base.lead)
        seeds = jnp.asarray(layer_seed + layers, jnp.uint32) if dropout else None
        magnitude = cls(base, a, b, scale).row_lengths() if dora else None
        return cls(base, a, b, scale, dropout, seeds, magnitude)

    def __call__(self, x: Array) -> Array:
        dropped = self._drop(x)
        axes, contracted = self.base.axes, self.base.contracted
        a = gather_weight("R" + axes[-contracted:], self.lora_a[...].astype(x.dtype))
        b = gather_weight(axes[:-contracted] + "R", self.lora_b[...].astype(x.dtype))
        is_float = isinstance(self.base, Linear) and self.base.bias is None
        if is_float and self.lora_magnitude is None and dropped is x:
            return self._one_product(x, a, b)
        y = self.base(x)
        update = self.scale * product(product(dropped, a, contracted), b, 1)
        if self.lora_magnitude is None:
            return y + update
        ratio = self._ratio(self.lora_magnitude).astype(x.dtype)
        plain = y if dropped is x else self.base(dropped)
        if self.base.bias is not None:
            plain -= self.base.bias[...].astype(x.dtype)
        return y + (ratio - 1) * plain + ratio * update

    def _one_product(self, x: Array, a: Array, b: Array) -> Array:
        """base(x) + scale * B A x (`model/low_rank.py`). The narrow side of a kernel is D or W."""
        base = self.base
        outs = base.shape[: -base.contracted]
        kernel = gather_weight(base.axes, base.dense(x.dtype)).reshape(math.prod(outs), -1)
        x = x.reshape(*x.shape[: x.ndim - base.contracted], -1)
        a, b = a.reshape(len(a), -1), b.reshape(len(kernel), -1)
        wide = "outputs" if base.axes[-1] in "DW" else "inputs"
        y = adapted_product(x, kernel, a, b, self.scale, wide)
        return y.reshape(*y.shape[:-1], *outs)

    def _drop(self, x: Array) -> Array:
        key = _dropout_key.get()
        if not self.dropout or self.seed is None or key is None:
            return x
        key = jax.random.fold_in(key, self.seed[...])
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)

    def _adapted(self) -> Array:
        """W + scale * B A in float32."""
        update = _outer(self.lora_a[...], self.lora_b[...], self.base.contracted)
        return self.base.dense(jnp.float32) + self.scale * update

    def row_lengths(self) -> Array:
        """The length of each row of W + scale * B A: float32[*lead, out...]."""
        if self.base.lead:  # one layer at a time, to save memory
            return jax.lax.map(LoRALinear.row_lengths, self)
        inputs = tuple(range(-self.base.contracted, 0))
        return jnp.sqrt(jnp.sum(self._adapted() ** 2, axis=inputs))

    def _ratio(self, magnitude: nnx.Param) -> Array:
        """The factor of each row with DoRA: float32[*lead, out...]."""
        lengths = self.row_lengths() if self.lengths is None else self.lengths[...]
        return magnitude[...] / jax.lax.stop_gradient(lengths)

    def merged(self) -> Linear:
        """A `Linear` that computes the same, in the dtype of the base's kernel; in float32 if the
        base is quantized."""
        base, kernel = self.base, self._adapted()
        if self.lora_magnitude is not None:
            ratio = self._ratio(self.lora_magnitude)
            kernel *= ratio.reshape(*ratio.shape, *(1 for _ in range(base.contracted)))
        if isinstance(base, Linear):
            kernel = kernel.astype(base.kernel[...].dtype)

        def make() -> Linear:
            options: dict = dict(contracted=base.contracted, bias=base.bias is not None)
            return Linear(base.axes, base.shape, rngs=nnx.Rngs(0), **options)

        linear = nnx.eval_shape(make)
        linear.kernel, linear.bias = nnx.Param(kernel), base.bias
        return linear


_dropout_key: ContextVar[Array | None] = ContextVar("dropout_key", default=None)


@contextmanager
def lora_dropout(key: Array) -> Iterator[None]:
    """Apply dropout in every `LoRALinear` that is traced inside. There is no dropout outside, so
    validation needs no switch."""
    token = _dropout_key.set(key)
    try:
        yield
    finally:
        _dropout_key.reset(token)


def add_lora(
    model: Model,
    rank: Mapping[str, int],
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    target: str = TARGET,
    seed: int = 0,
    dora: bool = False,
) -> Model:
    """Wrap the linear layers whose paths match `target`. The model's output does not change yet.

    Args:
        model: A model with its layers as a list or stacked.
        rank: Rank in each tower, as in {"decoder": 16, "vision": 8}; 0 or left out for none. The
            projector counts as decoder.
        alpha: Adapter outputs are scaled by alpha / rank.
        rslora: Scale them by alpha / sqrt(rank) instead (arXiv:2312.03732).
        dropout: Dropout rate of the adapters' inputs, inside `lora_dropout`.
        target: Regular expression of layer paths.
        seed: Seed of the initial A.
        dora: Train the length of each row as well (DoRA, arXiv:2402.09353).

    Raises:
        ValueError: The target, or one of its alternatives, matches no layer.
    """
    layers: dict[str, Leaf] = {}  # of towers with a rank
    count = 0

    def wrap(path: str, module: nnx.Module) -> LoRALinear | None:
        nonlocal count
        R = rank.get("vision" if path.startswith("vision/") else "decoder", 0)
        if not R or not isinstance(module, Linear | QuantizedLinear):
            return None
        layers[path] = jax.tree.leaves(module)[0]
        if not matches(target, path, layers[path]):
            return None
        count += 1
        scale = alpha / (R**0.5 if rslora else R)
        layer_seed = zlib.crc32(path.encode())
        return LoRALinear.create(module, R, scale, dropout, seed, layer_seed, dora)

    model = replace_modules(model, wrap)
    if not count:
        raise ValueError(
            f"LoRA has nothing to adapt: {target!r} matches no layer in a tower with a rank "
            "above 0; paths look like decoder/layers/3/attention/q"
        )
    for part in unmatched(target, layers):
        raise ValueError(
            f"every alternative of --lora-target must match a layer in a tower with a rank above "
            f"0, got {part!r}; paths look like decoder/layers/3/attention/q"
        )
    return model


def merge_lora(model: Model) -> Model:
    """Replace every `LoRALinear` by a `Linear` that computes the same."""
    return replace_modules(
        model, lambda _, module: module.merged() if isinstance(module, LoRALinear) else None
    )


def unmerge_lora(model: Model, factors: Mapping[str, Factors]) -> Model:
    """Undo `attach_lora` and `merge_lora`, up to rounding.

    Raises:
        ValueError: The adapter has magnitudes (DoRA): a merged model no longer has the lengths that
            its rows had before.
    """
    if any(f.magnitude is not None for f in factors.values()):
        raise ValueError("an adapter with magnitudes (DoRA) cannot be unmerged; load its base")
    negated = {path: Factors(f.a, f.b, -f.scale) for path, f in factors.items()}
    return merge_lora(attach_lora(model, negated))


def attach_lora(model: Model, factors: Mapping[str, Factors]) -> Model:
    """Add an adapter to a model whose layers are a list. `factors` are by path of the layers."""

    def wrap(path: str, module: nnx.Module) -> LoRALinear | None:
        if path not in factors:
            return None
        f = factors[path]
        a, b = jnp.asarray(f.a), jnp.asarray(f.b)
        layer = LoRALinear(module, a, b, f.scale)  # type: ignore[arg-type]
        if f.magnitude is None:
            return layer
        lengths, magnitude = layer.row_lengths(), jnp.asarray(f.magnitude)
        return LoRALinear(layer.base, a, b, f.scale, magnitude=magnitude, lengths=lengths)

    return replace_modules(model, wrap)


def lora_factors(model: PyTree) -> dict[str, Factors]:
    """The adapter of a model, stacked or not: factors by the path of each layer."""
    factors: dict[str, Factors] = {}
    for path, module in modules(model, LoRALinear).items():
        params = module.lora_a, module.lora_b, module.lora_magnitude
        arrays = [to_host(param[...]) for param in params if param is not None]
        if not module.base.lead:
            arrays = [array[None] for array in arrays]
        for i, (a, b, *magnitude) in enumerate(zip(*arrays, strict=True)):
            layer_path = path.replace("/layers/", f"/layers/{i}/") if module.base.lead else path
            factors[layer_path] = Factors(a, b, module.scale, *magnitude)
    return factors


def _outer(a: Array, b: Array, contracted: int) -> Array:
    """[R, in...] and [out..., R] -> [out..., in...], of every layer of a stack."""
    if a.ndim > contracted + 1:
        return jax.vmap(lambda a, b: _outer(a, b, contracted))(a, b)
    return jnp.tensordot(b, a, axes=1, precision="highest")
