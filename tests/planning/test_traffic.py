"""Counting the traffic to memory of programs of the TPU compiler."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from paligemma_jax.planning.hlo import Program
from paligemma_jax.planning.traffic import hbm_bytes
from paligemma_jax.planning.work import program_work

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
STORED = (
    Path(__file__).parent / "tpu_layers.txt"
)  # written by `python tests/planning/test_traffic.py`
LAYERS, SIZE = 4, 1024
MATRIX = 2 * SIZE * SIZE  # bytes


def layers_and_cache(x, weights, cache, step):
    """Layers in a loop, each a kernel, and an update of a cache that stays in HBM."""

    def multiply(left, right, out):
        dot = partial(jnp.dot, precision="default", preferred_element_type=jnp.float32)
        out[...] = dot(left[...], right[...]).astype(out.dtype)

    def layer(x, weight):
        block = pl.BlockSpec((SIZE // 4, SIZE), lambda i: (i, 0))
        y = pl.pallas_call(
            multiply,
            out_shape=x,
            grid=(4,),
            in_specs=[block, pl.BlockSpec((SIZE, SIZE), lambda i: (0, 0))],
            out_specs=block,
            cost_estimate=pl.CostEstimate(
                flops=2 * SIZE**3, bytes_accessed=3 * MATRIX, transcendentals=0
            ),
        )(x, weight)
        return jnp.tanh(y), None

    y, _ = jax.lax.scan(layer, x, weights)
    return y, jax.lax.dynamic_update_slice(cache, y[None], (step, 0, 0))


def compiled_text() -> str:
    """The program for a v5e chip, without the kernel's code and the paths of this machine."""
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    chip = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]
    ).devices[0]
    shapes = [(SIZE, SIZE), (LAYERS, SIZE, SIZE), (256, SIZE, SIZE)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sharding = jax.sharding.SingleDeviceSharding(chip)
    function = jax.jit(layers_and_cache, donate_argnums=2, in_shardings=sharding)
    lowered = function.lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32))
    compiled = lowered.compile().as_text() or ""
    text = re.sub(r'"(body|debug_locations)":"[^"]*"', r'"\1":""', compiled)
    return re.sub(r'"/.*/', '"', text)


@pytest.fixture(params=["stored", pytest.param("compiled", marks=needs_libtpu)])
def text(request) -> str:
    return STORED.read_text() if request.param == "stored" else compiled_text()


def traffic(text: str) -> dict[str, float]:
    """Bytes by the kind of the scheduled operation, over all of its runs."""
    program = Program.parse(text)
    moved: dict[str, float] = {}
    for operation, computation, times, scheduled in program.runs():
        if scheduled:
            size = times * hbm_bytes(operation, computation, program)
            moved[operation.opcode] = moved.get(operation.opcode, 0) + size
    return {kind: size for kind, size in moved.items() if size > 1000}  # without scalars


def test_a_tpu_program(text):
    """The layers work in the memory on the chip. Each reads its matrix of the stack, the first
    starts from `x`, the last result is copied out and written to one place of the cache."""
    assert traffic(text) == {"fusion": (LAYERS + 1) * MATRIX, "copy-done": 2 * MATRIX}
    assert program_work(Program.parse(text)).flops == LAYERS * 2 * SIZE**3


def test_operands_of_a_kernel_count_once(text):
    """If its operands were in HBM, the kernel would read two matrices and write one."""
    moved = traffic(re.sub(r"S\(1\)", "", text))
    assert moved["custom-call"] == LAYERS * 3 * MATRIX
    in_place = ", output_to_operand_aliasing={{}: (0, {})}, custom_call_target="
    moved = traffic(re.sub(r"S\(1\)", "", text).replace(", custom_call_target=", in_place))
    assert moved["custom-call"] == LAYERS * 2 * MATRIX


OPERATIONS = """
ENTRY %main (a: bf16[64,4,72]) -> bf16[64,4,72] {
  %a = bf16[64,4,72]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[64]{0:T(128)S(1)} parameter(1)
  %copy = bf16[64,4,72]{2,0,1:T(8,128)(2,1)} copy(%a)
  %alone = bf16[64,4,72]{2,1,0:T(8,128)(2,1)S(1)} copy(%a)
  %slice-start = ((bf16[64,4,72]{2,1,0:T(8,128)(2,1)}), bf16[8,4,72]{2,1,0:T(8,128)(2,1)S(1)}, \
u32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:4], [0:72]}
  %slice-done = bf16[8,4,72]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %gather = bf16[16,4,72]{2,1,0:T(8,128)(2,1)} gather(%a, %i), offset_dims={1,2}
  %all-gather-start = (bf16[64,4,72]{2,1,0}, bf16[128,4,72]{2,1,0}) all-gather-start(%a)
  %all-gather-done = bf16[128,4,72]{2,1,0} all-gather-done(%all-gather-start)
  %buffer = bf16[64,4,72]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %scatter = bf16[64,4,72]{2,1,0:T(8,128)(2,1)} scatter(%a, %i, %gather), to_apply=%add
}
"""
ROW = 2 * 8 * 128  # bytes of bf16[4, 72] in tiles of 8 x 128


def test_operations_outside_of_fusions():
    unpadded = 2 * 4 * 72
    assert traffic(OPERATIONS) == {
        # The layout of %copy puts 64 next to 72: no rows of padding. %alone stays on the chip.
        "copy": 64 * ROW + 64 * 4 * 128 * 2 + 64 * ROW,
        "slice-done": 8 * ROW,
        "gather": (16 + 16) * ROW,
        "all-gather-done": 64 * ROW + 128 * unpadded,
        "scatter": (16 + 16) * ROW,
    }


if __name__ == "__main__":
    STORED.write_text(compiled_text())
