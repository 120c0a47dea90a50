"""Attention on TPUs and GPUs with no scores in memory, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from paligemma_jax.kernels import flash
from paligemma_jax.kernels.flash import Scores

NEVER = 2**30  # a position beyond all others
Bounds = tuple[Int[Array, "B 3 T"], Int[Array, "B S 2"]]

# The axes of every array of the kernels; lse, delta: see `flash.py`.
AXES = {"queries": "B3T", "keys": "BS2", "lse": "BN1T", "delta": "BN1T"}
AXES |= dict.fromkeys(("q", "g", "out", "dq"), "BNTH") | dict.fromkeys(("k", "v"), "BKSH")
AXES |= dict.fromkeys(("dk", "dv"), "BNSH")
# Products of [T, S] pairs, by what a kernel computes.
PRODUCTS = {("out", "lse"): 2, ("dk", "dv", "dq"): 5, ("dk", "dv"): 4, ("dq",): 3}


@dataclass(frozen=True)
class Target:
    """How the kernels run on one kind of device."""

    blocks: Mapping[str, tuple[int, ...]]  # sizes of blocks of queries (T) and of keys (S)
    overhead: int  # of a block, in tokens
    sequential: bool  # whether the blocks of a head run one after the other
    powers: bool = False  # whether all sizes must be powers of two, so that arrays are padded
    params: pltpu.CompilerParams | triton.CompilerParams | None = None
    interpret: bool = False

    def block_sizes(self, split: str, sizes: Mapping[str, int], itemsize: int) -> dict[str, int]:
        """The size of blocks along each axis.

        Every block of the axis `split` takes as long as a full one; the other axis may have a
        shorter last block. Blocks of float32 (`itemsize` 4) are half as long on a GPU.
        """

        def cost(block: int) -> int:
            return -(-sizes[split] // block) * (block + self.overhead)

        blocks = {axis: max(choices) for axis, choices in self.blocks.items()}
        blocks[split] = min(self.blocks[split], key=cost)
        if not self.powers:
            return {axis: min(block, sizes[axis]) for axis, block in blocks.items()}
        blocks = {axis: block * 2 // itemsize for axis, block in blocks.items()}
        return blocks | {"H": pl.next_power_of_2(sizes["H"])}


TPU = Target(
    {"T": (1024, 512, 384, 256, 128), "S": (512, 384, 256, 128)},
    overhead=64,
    sequential=True,
    params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
    ),
)
CPU = Target(TPU.blocks, TPU.overhead, sequential=True, interpret=True)
CUDA = Target(
    {"T": (128,), "S": (32,)},  # the fastest of ten pairs on an H200
    overhead=0,
    sequential=False,
    powers=True,
    params=triton.CompilerParams(num_warps=8, num_stages=2),
)


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
    attention = partial(_attention, Scores(scale, softcap), bounds=bounds)
    if bounds is None and softcap is None and _cudnn_supports(q):
        cudnn = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=attention)
    return attention(q, k, v)


def _cudnn_supports(q: Array) -> bool:
    """Whether cuDNN, three times as fast as our kernel on an H200, is there for such heads."""
    return (
        jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and q.shape[-1] in range(8, 129, 8)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scores: Scores, q: Array, k: Array, v: Array, bounds: Bounds | None) -> Array:
    return _forward_rule(scores, q, k, v, bounds)[0]


def _forward_rule(scores, q, k, v, bounds):
    results = _on_platform(partial(_forward, scores), q, k, v, bounds)
    # Named, so that rematerialization can keep both and need not run the kernel again.
    out, lse = (checkpoint_name(x, "attention") for x in results)
    return out, (q, k, v, bounds, out, lse)


def _backward_rule(scores, residuals, g):
    q, k, v, bounds, out, lse = residuals
    delta = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)[:, :, None]
    return *_on_platform(partial(_backward, scores), q, k, v, bounds, g, lse, delta), None


_attention.defvjp(_forward_rule, _backward_rule)


def _on_platform(function: Callable, *args):
    branches = {"tpu": TPU, "cuda": CUDA, "default": CPU}
    return jax.lax.platform_dependent(
        *args, **{name: partial(function, target) for name, target in branches.items()}
    )


def _forward(scores: Scores, target: Target, q, k, v, bounds) -> tuple[Array, Array]:
    """The result [B, T, N, H], and lse [B, N, 1, T]."""
    arrays = _by_name(bounds, q=q, k=k, v=v)
    outputs = {"out": q.dtype, "lse": jnp.float32}
    out, lse = _run(flash.forward, "T", target, scores, arrays, outputs)
    return jnp.swapaxes(out, 1, 2), lse


def _backward(scores: Scores, target: Target, q, k, v, bounds, g, lse, delta):
    """The gradients of q, k and v."""
    arrays = _by_name(bounds, q=q, k=k, v=v, g=g) | {"lse": lse, "delta": delta}
    run = partial(_run, target=target, scores=scores, arrays=arrays)
    outputs = {"dk": k.dtype, "dv": v.dtype}
    if target.sequential:
        outputs |= {"dq": jnp.float32}
        dk, dv, dq = run(flash.backward, "S", outputs=outputs, size=k.shape[1])
    else:
        dk, dv = run(flash.backward, "S", outputs=outputs, size=k.shape[1])
        (dq,) = run(flash.query_gradient, "T", outputs={"dq": jnp.float32})
    dq = (scores.scale * jnp.swapaxes(dq, 1, 2)).astype(q.dtype)
    return dq, _sum_groups(dk, k), _sum_groups(dv, v)


def _sum_groups(x: Float[Array, "B N S H"], like: Float[Array, "B S K H"]) -> Array:
    """The gradient of a key head: the sum of those that its query heads give."""
    B, S, K, H = like.shape
    total = x.reshape(B, K, -1, S, H).sum(axis=2, dtype=jnp.float32)
    return jnp.swapaxes(total, 1, 2).astype(like.dtype)


def _by_name(bounds: Bounds | None, **arrays: Array) -> dict[str, Array]:
    """The inputs of the kernels by name, heads before tokens."""
    heads_first = {name: jnp.swapaxes(array, 1, 2) for name, array in arrays.items()}
    return heads_first if bounds is None else dict(queries=bounds[0], keys=bounds[1], **heads_first)


def _run(
    kernel: Callable,
    split: str,
    target: Target,
    scores: Scores,
    arrays: dict[str, Array],
    outputs: Mapping[str, DTypeLike],
    **options: int,
) -> list[Array]:
    """Run a kernel for every row, head, and block of the axis `split`. The kernel itself goes
    through the blocks of the other axis."""
    sizes = dict(zip("BNTHBKSH", (*arrays["q"].shape, *arrays["k"].shape), strict=True))
    blocks = target.block_sizes(split, sizes, arrays["q"].dtype.itemsize)
    B, N, G = sizes["B"], sizes["N"], sizes["N"] // sizes["K"]
    if target.powers and "keys" not in arrays and sizes["S"] % blocks["S"]:  # to hide the padding
        queries, keys = jnp.zeros((B, sizes["T"]), int), jnp.zeros((B, sizes["S"]), int)
        bounds = position_bounds((queries, queries > 0), (keys, keys > 0), keys == 0, 1)
        arrays = arrays | dict(zip(("queries", "keys"), bounds, strict=True))
    full = sizes
    if target.powers:
        arrays = {name: _pad(array, AXES[name], blocks) for name, array in arrays.items()}
        full = sizes | {axis: -(-sizes[axis] // block) * block for axis, block in blocks.items()}
    seen = full | {"B": 1, "N": 1, "K": 1, split: blocks[split]}

    def spec(name: str) -> pl.BlockSpec:
        def index(b, n, i):
            places = {"B": b, "N": n, "K": jax.lax.div(n, G), split: i}
            return tuple(places.get(axis, 0) for axis in AXES[name])

        return pl.BlockSpec(_shape(name, seen), index)

    inputs = {"queries": None, "keys": None} | arrays
    shapes = [jax.ShapeDtypeStruct(_shape(name, full), dtype) for name, dtype in outputs.items()]
    pairs = B * N * full["T"] * full["S"]
    results = pl.pallas_call(
        partial(kernel, scores=scores, block=blocks["S" if split == "T" else "T"], **options),
        grid=(B, N, pl.cdiv(full[split], blocks[split])),
        in_specs=[None if array is None else spec(name) for name, array in inputs.items()],
        out_specs=[spec(name) for name in outputs],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            flops=2 * PRODUCTS[tuple(outputs)] * pairs * sizes["H"],
            transcendentals=(1 if scores.softcap is None else 2) * pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *shapes)),
        ),
        compiler_params=target.params,
        interpret=target.interpret,
        name=f"attention_{kernel.__name__}",
    )(*inputs.values())
    return [
        result[tuple(slice(n) for n in _shape(name, sizes))]
        for name, result in zip(outputs, results, strict=True)
    ]


def _shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if axis in sizes else int(axis) for axis in AXES[name])


def _pad(x: Array, axes: str, blocks: Mapping[str, int]) -> Array:
    """Pad to full blocks. Padded keys are at NEVER, where no query attends to them."""
    widths = [(0, -n % blocks.get(axis, 1)) for axis, n in zip(axes, x.shape, strict=True)]
    return jnp.pad(x, widths, constant_values=NEVER if axes == AXES["keys"] else 0)
