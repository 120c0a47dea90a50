"""What the backward pass computes again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paligemma_jax.kernels.attention import fused_attention
from paligemma_jax.model.stack import remat, scan_layers


def forward_kernels(policy):
    """The number of fused forward passes in a gradient, on each platform."""

    def block(layer, x):
        return x + layer * fused_attention(x, x, x, scale=1.0), None

    def loss(x):
        with remat(policy):
            return scan_layers(block, x, jnp.ones(3))[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 8, 1, 128)))
    return str(jaxpr).count("name=attention_forward")


def test_the_result_of_fused_attention_is_kept_by_all_but_full():
    once = forward_kernels("none")
    assert once > 0
    counts = {policy: forward_kernels(policy) for policy in ("outputs", "dots", "full")}
    assert counts == {"outputs": once, "dots": once, "full": 2 * once}
