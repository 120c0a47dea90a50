"""Counting the work of compiled programs: loops, and programs that the TPU compiler writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paligemma_jax.planning.hlo import Program
from paligemma_jax.planning.work import COLLECTIVES, ProgramWork, program_work


def work_of(text: str | None) -> ProgramWork:
    return program_work(Program.parse(text or ""))


def test_a_product_in_a_loop_counts_once_per_iteration():
    """XLA's own analysis counts it once."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] @ weights[0]

    program = jax.jit(layers).lower(jnp.ones((32, 64)), jnp.ones((7, 64, 64))).compile()
    assert work_of(program.as_text()).flops == 8 * 2 * 32 * 64 * 64
    assert program.cost_analysis()["flops"] < 4 * 2 * 32 * 64 * 64


def test_a_loop_of_unknown_length_counts_once():
    def grow(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ x + 1, x)

    program = jax.jit(grow).lower(jnp.ones((16, 16))).compile()
    assert work_of(program.as_text()).flops == 2 * 16**3


TPU_PROGRAM = """HloModule jit_step

%fused.1 (p: bf16[8,64], q: bf16[64,16]) -> (bf16[8,16], bf16[64,32]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %c = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf, \
metadata={op_name="a/...i,oi->...o"}
}

%body (t: (s32[], bf16[4,8,72])) -> (s32[], bf16[4,8,72]) {
  %t = (s32[]{:T(128)}, /*index=1*/bf16[4,8,72]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8,72]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %y = bf16[4,8,72]{2,1,0} copy(%x)
  %scores = f32[4,8,8]{2,1,0:T(8,128)} convolution(%x, %y), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %padded = bf16[4,8,72]{2,1,0} convolution(%scores, %y), \
window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=0bf_0io->0bf
  %r = f32[16]{0} all-reduce(%z), channel_id=6, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[4,8,72]{2,1,0}) tuple(%i, %x)
}

%condition (t: (s32[], bf16[4,8,72])) -> pred[] {
  %limit = s32[]{:T(128)} constant(26)
  %t = (s32[]{:T(128)}, bf16[4,8,72]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[8,64], b: bf16[64,16]) -> bf16[8,16] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[64,16]{1,0} parameter(1)
  %one = (bf16[8,16]{1,0}, bf16[64,32]{1,0}) fusion(%a, %b), kind=kOutput, calls=%fused.1
  %two = (bf16[8,16]{1,0}, bf16[64,32]{1,0}) fusion(%a, %b), kind=kOutput, calls=%fused.1
  %loop = (s32[]{:T(128)}, bf16[4,8,72]{2,1,0}) while(%s), condition=%condition, body=%body, \
metadata={op_name="while"}
  ROOT %done = bf16[8,16]{1,0} get-tuple-element(%one), index=0
}
"""
PADDED_PAIRS = 1 + 2 + 3 + 4  # of 4 outputs and a kernel of 4 that starts 3 pads before the input


def test_a_tpu_program():
    """Products are convolutions, with the batch as a spatial axis; one gather is written in two
    pieces; loops state their length by a comparison."""
    work = work_of(TPU_PROGRAM)
    scores = 2 * 4 * 8 * 8 * 72  # four matrices, each times its own
    padded = PADDED_PAIRS * 2 * 8 * 72 * 8
    assert work.flops == 2 * (2 * 8 * 16 * 64) + 26 * (scores + padded)
    assert work.sent_bytes == {
        "all-gather": 64 * 32 * 2 * 3 / 4,
        "all-reduce": 26 * 2 * 16 * 4 * 3 / 4,
    }
    bodies = Program.parse(TPU_PROGRAM).computations.values()
    kinds = [operation.kind for body in bodies for operation in body.values()]
    collectives = [kind for kind in kinds if kind in COLLECTIVES]
    assert collectives == ["all-gather", "all-reduce"]


def test_a_loop_with_step_two():
    """A TPU compiles products whose slices go around a ring in both directions to such loops."""
    step = "  %step = s32[] constant(2)\n  %next = s32[] add(%now, %step)\n"
    by_two = TPU_PROGRAM.replace("  %r =", step + "  %r =").replace("tuple(%i,", "tuple(%next,")
    sent = work_of(TPU_PROGRAM).sent_bytes["all-reduce"]
    assert work_of(by_two).sent_bytes["all-reduce"] == sent / 2
    odd = by_two.replace("constant(26)", "constant(25)")
    assert work_of(odd) == work_of(by_two)


def test_products_of_int8_count_apart():
    work = work_of(
        TPU_PROGRAM.replace("bf16[8,64]", "s8[8,64]").replace("bf16[64,16]", "s8[64,16]")
    )
    assert work.int8_flops == 2 * (2 * 8 * 16 * 64) < work.flops
    assert work_of(TPU_PROGRAM).int8_flops == 0
