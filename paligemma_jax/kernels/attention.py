"""Attention on TPUs and GPUs with no scores in memory, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float, Int

from paligemma_jax.kernels import flash
from paligemma_jax.kernels.flash import Scores

NEVER = 2**30  # a position beyond all others
Bounds = tuple[Int[Array, "B 3 T"], Int[Array, "B S 2"]]

# The axes of every array of the kernels; lse, delta: see `flash.py`.
AXES = {"queries": "B3T", "keys": "BS2", "lse": "BN1T", "delta": "BN1T"}
AXES |= dict.fromkeys(("q", "g", "out", "dq"), "BNTH") | dict.fromkeys(("k", "v"), "BKSH")
AXES |= dict.fromkeys(("dk", "dv"), "BNSH")


@dataclass(frozen=True)
class Target:
    """How the kernels run on one kind of device."""

    blocks: tuple[int, ...]  # sizes of blocks of queries and of keys
    overhead: int  # of a block, in tokens
    sequential: bool  # whether the blocks of a head run one after the other
    params: object = None
    interpret: bool = False

    def block(self, tokens: int) -> int:
        """The size of blocks for this many tokens, with little padding and overhead."""
        return min(self.blocks, key=lambda size: -(-tokens // size) * (size + self.overhead))


TPU = Target(
    (512, 384, 256, 128),
    overhead=64,
    sequential=True,
    params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
    ),
)
CPU = Target(TPU.blocks, TPU.overhead, sequential=True, interpret=True)
CUDA = Target((64,), 0, sequential=False, params=triton.CompilerParams(num_warps=8, num_stages=2))


def position_bounds(
    queries: tuple[Int[Array, "B T"], Bool[Array, "B T"]],
    keys: tuple[Int[Array, "B S"], Bool[Array, "B S"]],
    valid: Bool[Array, "B S"],
    window: Int[Array, ""] | int,
) -> Bounds:
    """`model.masks.prefix_lm_mask` as comparisons of a few numbers per token.

    A query has (first, last, prefix_last), a key (position, prefix_position). A query attends to a
    key if first <= position <= last, or if prefix_position <= prefix_last.

    Args:
        queries, keys: Positions, and which tokens are on the prefix.
        valid: The keys that are no pads.
        window: As in `prefix_lm_mask`.
    """
    (last, query_prefix), (position, key_prefix) = queries, keys
    rows = [last - window + 1, last, jnp.where(query_prefix, 0, -1)]
    columns = [jnp.where(valid, position, NEVER), jnp.where(key_prefix & valid, 0, NEVER)]
    return jnp.stack(rows, axis=1), jnp.stack(columns, axis=2)


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bounds: Bounds | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute `model.attention.attend` without scores in memory, forward and backward.

    On a CPU the kernels run in Pallas' interpreter, for tests.

    Args:
        bounds: Which query attends to which key (`position_bounds`); without it, all to all. A
            query that attends to nothing, such as a pad, has an arbitrary finite result.
    """
    return _attention(Scores(scale, softcap), q, k, v, bounds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scores: Scores, q: Array, k: Array, v: Array, bounds: Bounds | None) -> Array:
    return _forward_rule(scores, q, k, v, bounds)[0]


def _forward_rule(scores, q, k, v, bounds):
    out, lse = _on_platform(partial(_forward, scores), q, k, v, bounds)
    return out, (q, k, v, bounds, out, lse)


def _backward_rule(scores, residuals, g):
    q, k, v, bounds, out, lse = residuals
    delta = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)
    return *_on_platform(partial(_backward, scores), q, k, v, bounds, g, lse, delta), None


_attention.defvjp(_forward_rule, _backward_rule)


def _on_platform(function: Callable, *args):
    branches = {"tpu": TPU, "cuda": CUDA, "default": CPU}
    return jax.lax.platform_dependent(
        *args, **{name: partial(function, target) for name, target in branches.items()}
    )


def _forward(scores: Scores, target: Target, q, k, v, bounds):
    """The result [B, T, N, H] and lse [B, N, T]."""
    inputs, blocks = _inputs(target, q, k, v, bounds)
    shape = inputs["q"].shape
    outputs = {"out": (shape, q.dtype), "lse": ((*shape[:2], 1, shape[2]), jnp.float32)}
    out, lse = _call(flash.forward, "T", target, scores, blocks, inputs, outputs)
    T = q.shape[1]
    return jnp.swapaxes(out[:, :, :T], 1, 2), lse[:, :, 0, :T]


def _backward(scores: Scores, target: Target, q, k, v, bounds, g, lse, delta):
    """The gradients of q, k and v."""
    inputs, blocks = _inputs(target, q, k, v, bounds)
    inputs["g"] = _pad(jnp.swapaxes(g, 1, 2), 2, blocks["T"])
    inputs |= {"lse": _pad(lse[:, :, None], 3, blocks["T"])}
    inputs |= {"delta": _pad(delta[:, :, None], 3, blocks["T"])}
    dq = {"dq": (inputs["q"].shape, jnp.float32)}
    B, N = dq["dq"][0][:2]
    shape = (B, N, *inputs["k"].shape[2:])
    outputs = {"dk": (shape, k.dtype), "dv": (shape, v.dtype)}
    run = partial(_call, target=target, scores=scores, blocks=blocks, inputs=inputs)
    if target.sequential:
        dk, dv, dq = run(flash.backward, "S", outputs=outputs | dq)
    else:
        dk, dv = run(flash.backward, "S", outputs=outputs)
        (dq,) = run(flash.query_gradient, "T", outputs=dq)
    T, S, K = q.shape[1], k.shape[1], k.shape[2]

    def of_group(x: Array) -> Array:  # the gradient of a key head is a sum over its query heads
        grouped = x[:, :, :S].reshape(B, K, N // K, S, -1)
        return jnp.moveaxis(grouped.sum(axis=2, dtype=jnp.float32).astype(x.dtype), 1, 2)

    dq = (scores.scale * jnp.swapaxes(dq[:, :, :T], 1, 2)).astype(q.dtype)
    return dq, of_group(dk), of_group(dv)


def _inputs(target: Target, q, k, v, bounds) -> tuple[dict[str, Array | None], dict[str, int]]:
    """The arrays of the kernels, padded to full blocks, and the sizes of the blocks."""
    T, S = q.shape[1], k.shape[1]
    blocks = {"T": target.block(T), "S": target.block(S)}
    if bounds is None and S % blocks["S"]:  # only to hide the padding
        queries, keys = jnp.zeros((len(q), T), jnp.int32), jnp.zeros((len(q), S), jnp.int32)
        bounds = position_bounds((queries, queries > 0), (keys, keys > 0), keys == 0, 1)
    queries, keys = bounds or (None, None)
    arrays = {"queries": queries, "keys": keys}
    arrays |= {name: jnp.swapaxes(x, 1, 2) for name, x in {"q": q, "k": k, "v": v}.items()}
    for name, array in arrays.items():
        letter = "T" if "T" in AXES[name] else "S"
        if array is not None:
            fill = NEVER if name == "keys" else 0
            arrays[name] = _pad(array, AXES[name].index(letter), blocks[letter], fill)
    return arrays, blocks


def _pad(x: Array, axis: int, block: int, fill: int = 0) -> Array:
    widths = [(0, -x.shape[i] % block if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _call(
    kernel: Callable,
    split: str,
    target: Target,
    scores: Scores,
    blocks: Mapping[str, int],
    inputs: Mapping[str, Array | None],
    outputs: Mapping[str, tuple],
) -> list[Array]:
    """Run a kernel for every row, head, and block of the axis `split`; the kernel itself goes
    through the blocks of the other."""
    (B, N, T, H), (_, K, S, _) = inputs["q"].shape, inputs["k"].shape
    sizes = {"B": 1, "N": 1, "K": 1, "T": T, "S": S, "H": H, "1": 1, "2": 2, "3": 3}
    sizes[split] = blocks[split]

    def spec(name: str) -> pl.BlockSpec:
        def index(b, n, i):
            places = {"B": b, "N": n, "K": jax.lax.div(n, N // K), split: i}
            return tuple(places.get(axis, 0) for axis in AXES[name])

        return pl.BlockSpec(tuple(sizes[axis] for axis in AXES[name]), index)

    products = {"forward": 2, "backward": 5 if target.sequential else 4, "query_gradient": 3}
    moved = [x for x in inputs.values() if x is not None]
    shapes = [jax.ShapeDtypeStruct(*output) for output in outputs.values()]
    return pl.pallas_call(
        partial(kernel, scores=scores, block=blocks["S" if split == "T" else "T"]),
        grid=(B, N, (T if split == "T" else S) // blocks[split]),
        in_specs=[None if x is None else spec(name) for name, x in inputs.items()],
        out_specs=[spec(name) for name in outputs],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            flops=2 * products[kernel.__name__] * B * N * T * S * H,
            transcendentals=(1 if scores.softcap is None else 2) * B * N * T * S,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*moved, *shapes)),
        ),
        compiler_params=target.params,
        interpret=target.interpret,
        name=f"attention_{kernel.__name__}",
    )(*inputs.values())
