"""Quantized models in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax import nnx

    from paligemma_jax.model.layers import Linear
    from paligemma_jax.model.paligemma import PaliGemma


def dense_model(quantized: PaliGemma, plain: PaliGemma) -> PaliGemma:
    """The model of the same weights in float32. `plain` is the one that was quantized."""
    import jax
    import jax.numpy as jnp

    from paligemma_jax.model.layers import Linear
    from paligemma_jax.model.tree import modules, replace_modules
    from paligemma_jax.quantization.modules import QuantizedLinear

    linears = modules(plain, Linear)

    def widen(path: str, module: nnx.Module) -> Linear | None:
        if not isinstance(module, QuantizedLinear):
            return None
        linear = jax.tree.map(lambda x: x, linears[path])
        linear.kernel = type(linear.kernel)(module.dense(jnp.float32))
        return linear

    return replace_modules(quantized, widen)
