"""Low-rank adaptation (arXiv:2106.09685) by wrapping: a `LoRA` stands in the place of an `Einsum` or a `Quantized`, and adds to what that says."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from convert.peft import Factors
from paligemma_jax.model.layers import Linear, product
from paligemma_jax.model.tree import replace_modules
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.training.config import FinetuneConfig


class LoRALinear(nnx.Module):
    """base(x) + scale * B A x, with A [R, in...] and B [out..., R] in float32 (a stack's leading axes first); x is dropped out before A."""

    def __init__(self, base: Any, a: Array, b: Array, scale: float, dropout: float = 0.0, seed: Array | None = None):
        self.base, self.scale, self.dropout = base, scale, dropout
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        self.seed = None if seed is None else nnx.Variable(seed)

    def __call__(self, x: Array) -> Array:
        low = product(self._dropped(x), self.lora_a[...].astype(x.dtype), self.base.contracted)
        return self.base(x) + self.scale * product(low, self.lora_b[...].astype(x.dtype), 1)

    def _dropped(self, x: Array) -> Array:
        if not self.dropout or self.seed is None or (key := _key.get()) is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, self.seed[...]), 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)

    def merged(self) -> Linear:
        """A plain `Einsum` that computes the same; its kernel has the dtype of the base's, float32 where that is quantized."""
        base = self.base
        kernel = base.dense(jnp.float32) + self.scale * _outer(self.lora_a[...], self.lora_b[...], base.contracted)
        plain = nnx.eval_shape(
            lambda: Linear(base.axes, base.shape, contracted=base.contracted, bias=base.bias is not None, rngs=nnx.Rngs(0))
        )
        plain.kernel = nnx.Param(kernel.astype(base.kernel[...].dtype if isinstance(base, Linear) else kernel.dtype))
        plain.bias = base.bias
        return plain


_key: ContextVar[Array | None] = ContextVar("dropout", default=None)


@contextmanager
def lora_dropout(key: Array) -> Iterator[None]:
    """Every `LoRA` traced inside drops out, each layer its own way. Outside none does: nothing is to be switched off to measure."""
    token = _key.set(key)
    try:
        yield
    finally:
        _key.reset(token)


def add_lora(
    model: Any, rank: Mapping[str, int], alpha: float, rslora: bool = False, rate: float = 0.0, target: str = FinetuneConfig.lora_target, seed: int = 0
) -> Any:
    """The model, stacked or not, with LoRA on every product whose path matches `target`; it computes what it did, for B is 0.

    A is drawn uniformly from +-1/sqrt(fan_in), as peft does.

    Args:
      rank: of the products of each tower: {"decoder": 16, "vision": 8}; 0 for none. The projector's is the decoder's.
      alpha: what is learned counts alpha / rank times, with `rslora` alpha / sqrt(rank) times (arXiv:2312.03732).
      rate: of the dropout.
    """
    found = []

    def make(path: str, module: Any) -> LoRALinear | None:
        R = rank.get("vision" if path.startswith("vision/") else "decoder", 0)
        if not isinstance(module, Linear | QuantizedLinear) or not R or not re.fullmatch(target, path):
            return None
        found.append(path)
        outs = len(module.shape) - module.contracted
        out, ins = module.shape[:outs], module.shape[outs:]
        own = zlib.crc32(path.encode())
        bound = math.prod(ins) ** -0.5
        a = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), own), (*module.lead, R, *ins), jnp.float32, -bound, bound)
        seeds = jnp.asarray(own + np.arange(math.prod(module.lead)).reshape(module.lead), jnp.uint32) if rate else None
        return LoRALinear(module, a, jnp.zeros((*module.lead, *out, R)), alpha / (R**0.5 if rslora else R), rate, seeds)

    model = replace_modules(model, make)
    if not found:
        raise ValueError(
            f"LoRA has nothing to adapt: no product's path matches {target!r} in a tower of a rank above 0 (decoder/layers/3/attention/q)"
        )
    return model


def merge_lora(model: Any) -> Any:
    """The model with every `LoRA` added to its kernel, and none left; a quantized base becomes dense."""
    return replace_modules(model, lambda path, module: module.merged() if isinstance(module, LoRALinear) else None)


def unmerge_lora(model: Any, factors: Mapping[str, Factors]) -> Any:
    """The model (layers as a list) without what `attach(...)` and `merge` added, but for rounding."""
    return merge_lora(attach_lora(model, {path: Factors(f.a, f.b, -f.scale) for path, f in factors.items()}))


def attach_lora(model: Any, factors: Mapping[str, Factors]) -> Any:
    """The model (layers as a list) with the adapter that `factors` are, path by path, as `add_lora` puts it."""
    return replace_modules(model, lambda path, module: LoRALinear(module, jnp.asarray(f.a), jnp.asarray(f.b), f.scale) if (f := factors.get(path)) else None)


def lora_factors(model: Any) -> dict[str, Factors]:
    """The adapter of a model, stacked or not: what it learned, by the path of each product with its layer's number."""
    found: dict[str, Factors] = {}

    def visit(path: str, module: Any) -> None:
        if not isinstance(module, LoRALinear):
            return
        a, b = to_host(module.lora_a[...]), to_host(module.lora_b[...])
        if a.ndim == module.base.contracted + 1:
            found[path] = Factors(a, b, module.scale)
        else:
            found.update({path.replace("/layers/", f"/layers/{i}/"): Factors(a[i], b[i], module.scale) for i in range(len(a))})

    replace_modules(model, visit)
    return found


def _outer(a: Array, b: Array, contracted: int) -> Array:
    """[out..., R] and [R, in...] -> [out..., in...], of every layer of a stack."""
    if a.ndim > contracted + 1:
        return jax.vmap(lambda a, b: _outer(a, b, contracted))(a, b)
    return jnp.tensordot(b, a, axes=1, precision="highest")
