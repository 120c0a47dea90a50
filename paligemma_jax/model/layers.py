"""The few parts that both towers use, how layers are run (`fold`) and how one looks inside (`collect`)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

# Axis letters used in every einsum, comment and weight row:
#   B batch   T query tokens   S key tokens (cache slots)   D decoder width    V vocabulary   L layers
#   N heads   K key/value heads   G = N/K   H head size     F MLP width
#   M images  P patches        U = patch*patch*3 pixels     W vision width


class Einsum(nnx.Module):
    """`einsum(equation, x, kernel) + bias` in x's dtype: every matrix product of the model, so LoRA and quantization have one thing to wrap.

    The kernel is [out..., in...], as torch holds it: on a CPU the product then reads it as fast as memory gives it ([in, out]: two thirds to
    nine tenths of that; GPUs and TPUs take both alike). The bias has the axes of `out`. Weights are drawn from N(0, 1/fan_in).
    """

    def __init__(self, equation: str, shape: tuple[int, ...], *, bias: bool = False, rngs: nnx.Rngs):
        operands, result = equation.split("->")
        self.axes = operands.split(",")[1]
        outs = sum(axis in result for axis in self.axes)
        self.shape, self.contracted = shape, len(shape) - outs
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * math.prod(shape[outs:]) ** -0.5)
        self.bias = nnx.Param(jnp.zeros(shape[:outs])) if bias else None

    @property
    def lead(self) -> tuple[int, ...]:
        """A stack's leading axes."""
        return self.kernel.shape[: self.kernel.ndim - len(self.shape)]

    def dense(self, dtype: Any) -> Array:
        return self.kernel[...].astype(dtype)

    def __call__(self, x: Array) -> Array:
        if self.bias is None:
            return product(x, self.dense(x.dtype), self.contracted)
        wide = product(x, self.dense(x.dtype), self.contracted, jnp.float32)  # rounded once, with its bias, as torch's addmm
        return biased(wide, self.bias).astype(x.dtype)


def product(x: Array, kernel: Array, contracted: int, dtype: Any = None) -> Array:
    """x [..., in...] times kernel [out..., in...] over the last `contracted` axes -> [..., out...] in `dtype`, by default x's.

    As one matrix of [out, in]: with more axes XLA on a CPU transposes and copies it for each product.
    """
    outs = kernel.shape[: kernel.ndim - contracted]
    y = jnp.einsum("...i,oi->...o", x.reshape(*x.shape[: x.ndim - contracted], -1), kernel.reshape(math.prod(outs), -1), preferred_element_type=dtype)
    return y.reshape(*y.shape[:-1], *outs)


def biased(y: Array, bias: Any) -> Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def swap(model: Any, make: Callable[[str, Any], Any]) -> Any:
    """A copy of the model with `make(path, module)` in the place of every module for which that is not None; the arrays are the same."""

    def visit(module: Any, path: str) -> None:
        listed = isinstance(module, nnx.List)
        children: list[tuple[Any, Any]] = list(enumerate(module) if listed else vars(module).items())
        for name, child in children:
            if not isinstance(child, nnx.Module):
                continue
            if (new := make(f"{path}{name}", child)) is None:
                visit(child, f"{path}{name}/")
            elif listed:
                module[name] = new
            else:
                setattr(module, name, new)

    visit(model := jax.tree.map(lambda leaf: leaf, model), "")
    return model


class RMSNorm(nnx.Module):
    """Gemma's: x / rms(x) * (1 + scale), all in float32, one cast at the end (transformers `Gemma2RMSNorm`)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Biased variance, statistics in float32 (SigLIP)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotates the halves of x [B, T, N, H] by its positions int32[B, T], in float32.

    Inverse frequencies as transformers rounds them. big_vision divides by the timescale instead; XLA compiles both to the same product.
    """
    exponent = np.arange(0, x.shape[-1], 2, dtype=np.float32) / np.float32(x.shape[-1])
    timescale = (theta ** exponent.astype(np.float64)).astype(np.float32)  # correctly rounded, as torch's pow nearly always is; numpy's is not
    angle = positions[..., None, None].astype(jnp.float32) * (np.float32(1) / timescale)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def fold(block: Callable[..., tuple[Array, Any]], x: Array, layers: Any, *rows: Any) -> tuple[Array, Any]:
    """Runs `x, y = block(layer, x, *row)` through all layers; returns the last x and the y of every layer.

    `layers` is a sequence, as an `nnx.List` (a Python loop; `rows` are sequences, ys come back as a list) or what `stack` made of it
    (one `jax.lax.scan`; rows and ys have a leading layer axis). Inside of a `remat`, the backward pass computes the blocks again.
    """
    x = place("rows tokens", x)
    if (policy := _remat.get()) is not None:
        block = jax.checkpoint(block, policy=policy)
    if not isinstance(layers, Sequence):
        if _collecting.get() is None:

            def one(x: Array, row: tuple) -> tuple[Array, Any]:
                x, y = block(row[0], x, *row[1:])
                return place("rows tokens", x), y

            return jax.lax.scan(one, x, (layers, *rows))
        layers, rows = unstack(layers), tuple(unstack(row) for row in rows)
    ys = []
    for i, layer in enumerate(layers):
        with scope(f"layers/{i}"):
            x, y = block(layer, x, *(row[i] for row in rows))
            x = stage("", place("rows tokens", x))
        ys.append(y)
    return x, ys


_placing: ContextVar[Callable[[str, Array], Array] | None] = ContextVar("placing", default=None)


def place(axes: str, x: Array) -> Array:
    """Names the first axes of `x` to whoever spreads it over devices (`placing`): "rows", "tokens", or a letter. Returns it unchanged."""
    return x if (spread := _placing.get()) is None else spread(axes, x)


def joined(x: Array) -> Array:
    """[B, T, D] whose tokens may lie on different devices, all of them where heads or the MLP are split: both ways, so in the gradient too."""
    return place("rows", place("rows tokens", x))


def parted(x: Array) -> Array:
    """The inverse of `joined`."""
    return place("rows tokens", place("rows", x))


@contextmanager
def placing(spread: Callable[[str, Array], Array] | None) -> Iterator[None]:
    """`place` asks `spread` while traced inside. No mesh is known here: see `scaling/sharding.py`."""
    token = _placing.set(spread)
    try:
        yield
    finally:
        _placing.reset(token)


_remat: ContextVar[Callable[..., bool] | None] = ContextVar("remat", default=None)
REMAT = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@contextmanager
def remat(what: str) -> Iterator[None]:
    """What `fold` does not keep of its blocks for the backward pass while traced inside: "none" of it, "full", or all but the "dots" with weights."""
    token = _remat.set(REMAT.get(what))
    try:
        yield
    finally:
        _remat.reset(token)


def stack(layers: nnx.List) -> Any:
    """The layers as one, each array with a leading layer axis: what `fold` scans over. Compile time no longer grows with depth."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def unstack(layers: Any) -> nnx.List:
    """The inverse of `stack`."""
    depth = len(jax.tree.leaves(layers)[0])
    return nnx.List([jax.tree.map(lambda a, i=i: a[i], layers) for i in range(depth)])


def parameters(model: Any) -> dict[str, Any]:
    """Every parameter by its path, as "decoder/layers/3/attention/q/kernel"; values as the model holds them (arrays, shapes, shardings)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {_path(path): leaf for path, leaf in leaves}


def with_parameters(model: Any, values: Callable[[str], Any]) -> Any:
    """The same model with `values(path)` in the place of every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values(_path(path)), model)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


@dataclass(frozen=True)
class _Collection:
    stages: dict[str, Array]
    attention: bool
    branches: bool
    fed: Mapping[str, Any]


_collecting: ContextVar[tuple[_Collection, str] | None] = ContextVar("collecting", default=None)


@contextmanager
def collect(attention: bool = False, branches: bool = False, fed: Mapping[str, Any] = MappingProxyType({})) -> Iterator[dict[str, Array]]:
    """Gathers what `stage` is given while the model is called inside; with `attention`, the attention weights too.

    branches: also what each block's attention and MLP add to the residual stream: layers/0/attention/output, layers/0/mlp/output.
    fed: by stage, the value that the model goes on with instead of its own, which is gathered all the same: each stage then shows
    what is computed between it and the fed one before it, and no error of earlier ones.

    Works under `jax.jit` when the whole `with` lies inside the traced function. Outside of a `collect`, `stage` does nothing.
    """
    stages: dict[str, Array] = OrderedDict()  # jit sorts the keys of a plain dict
    token = _collecting.set((_Collection(stages, attention, branches, fed), ""))
    try:
        yield stages
    finally:
        _collecting.reset(token)


def collects_attention() -> bool:
    current = _collecting.get()
    return current is not None and current[0].attention


def stage(name: str, value: Array, branch: bool = False) -> Array:
    """Names an intermediate result; returns it, or what is fed in its place."""
    if (current := _collecting.get()) is None or (branch and not current[0].branches):
        return value
    collection, prefix = current
    name = f"{prefix}/{name}".strip("/")
    collection.stages[name] = value
    return jnp.asarray(collection.fed[name], value.dtype) if name in collection.fed else value


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefixes the stages named inside, and the operations in a profile."""
    current = _collecting.get()
    token = _collecting.set(current and (current[0], f"{current[1]}/{name}".strip("/")))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _collecting.reset(token)
