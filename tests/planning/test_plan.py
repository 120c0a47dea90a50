"""Plans: what a compiled program does by its text, what fits, and the same programs through the TPU's compiler where that is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support.paths import ROOT

from convert.formats import convert
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.config import PRESETS
from paligemma_jax.model.flops import prefill_flops, vision_flops
from paligemma_jax.model.tree import parameters
from paligemma_jax.planning import chips, hlo

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed (extra: plan)")


@pytest.fixture
def plan(command):
    """The arguments of `paligemma-jax plan` -> its JSON, as one object or several; or what it says on stderr."""

    def run(*arguments):
        before = os.environ.copy()  # it is changed, before jax would be imported
        try:
            code, out, err = command("plan", "--json", *arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)
        found = [json.loads(line) for line in out.splitlines()]
        return err if code else found[0] if len(found) == 1 else found

    return run


def test_slices():
    assert [(found.chip, found.count) for found in map(chips.find_slice, ["v5e:4x4", "v5p:2x2x2", "h200x8", "a100-80gx3", "h100"])] == [
        (chips.CHIPS[kind], count) for kind, count in [("v5e", 16), ("v5p", 8), ("h200", 8), ("a100-80g", 3), ("h100", 1)]
    ]
    for wrong in ["v5e", "v5e:0x4", "v5ex8", "h200:2x4", "h200x0", "tpu", "v5e:4", "v5e:", "", "v5e:4x4x4", "v5p:2x2"]:
        with pytest.raises(ValueError, match="--on"):
            chips.find_slice(wrong)
    with pytest.raises(ValueError, match=r"v5litepod-8: not known; .* v5e-8 or v5litepod-8 is v5e:2x4"):
        chips.find_slice("v5litepod-8")


def test_a_product_in_a_loop_counts_as_often_as_it_turns():
    """XLA's own analysis counts it once."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] @ weights[0]

    done = jax.jit(layers).lower(jnp.ones((32, 64)), jnp.ones((7, 64, 64))).compile()
    assert hlo.program_work(done.as_text()).flops == 8 * 2 * 32 * 64 * 64
    assert done.cost_analysis()["flops"] < 4 * 2 * 32 * 64 * 64
    until = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ x + 1, x)
    assert hlo.program_work(jax.jit(until).lower(jnp.ones((16, 16))).compile().as_text()).flops == 2 * 16**3


TPU = """HloModule jit_step

%fused.1 (p: bf16[8,64], q: bf16[64,16]) -> (bf16[8,16], bf16[64,32]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %c = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf, metadata={op_name="a/...i,oi->...o"}
}

%body (t: (s32[], bf16[4,8,72])) -> (s32[], bf16[4,8,72]) {
  %t = (s32[]{:T(128)}, /*index=1*/bf16[4,8,72]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8,72]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %y = bf16[4,8,72]{2,1,0} copy(%x)
  %scores = f32[4,8,8]{2,1,0:T(8,128)} convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %padded = bf16[4,8,72]{2,1,0} convolution(%scores, %y), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=0bf_0io->0bf
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
  %loop = (s32[]{:T(128)}, bf16[4,8,72]{2,1,0}) while(%s), condition=%condition, body=%body, metadata={op_name="while"}
  ROOT %done = bf16[8,16]{1,0} get-tuple-element(%one), index=0
}
"""


def test_a_tpu_program():
    """Products are convolutions, those of a batch over a spatial axis; one gather is written in two pieces; loops say their turns by a comparison."""
    found = hlo.program_work(TPU)
    batched = 2 * 4 * 8 * 8 * 72  # each of four matrices by its own
    assert found.flops == 2 * (2 * 8 * 16 * 64) + 26 * (batched + pairs_of_four() * 2 * 8 * 72 * 8)
    assert found.sent == {"all-gather": 64 * 32 * 2 * 3 / 4, "all-reduce": 26 * 2 * 16 * 4 * 3 / 4}
    operations = [operation.kind for body in hlo._computations(TPU)[0].values() for operation in body.values()]
    assert [kind for kind in operations if kind in hlo.COLLECTIVES] == ["all-gather", "all-reduce"]


def test_a_loop_of_two_rounds_a_turn():
    """As a TPU multiplies by slices that go round in a ring both ways: the counter goes up by two."""
    rounds = TPU.replace("  %r =", "  %step = s32[] constant(2)\n  %next = s32[] add(%now, %step)\n  %r =").replace("tuple(%i,", "tuple(%next,")
    assert hlo.program_work(rounds).sent["all-reduce"] == hlo.program_work(TPU).sent["all-reduce"] / 2
    odd = rounds.replace("constant(26)", "constant(25)")
    assert hlo.program_work(odd) == hlo.program_work(rounds)


def pairs_of_four():
    """Where four places of the output meet a kernel of four behind three pads."""
    return 1 + 2 + 3 + 4


@pytest.mark.parametrize("workload", ["generate", "finetune"])
def test_one_chip_does_all_of_the_counted_work(plan, workload):
    """By the compiler for CPUs."""
    asked = ["--model", "tiny", "--workload", workload, "--on", "h200", "--batch", "2", "--text", "32", "--new", "8"]
    found = plan(*asked)
    assert found["fits"] and found["estimate"] and 0 < found["bytes_per_chip"] < found["chip_bytes"] == 141e9
    assert found["compile_seconds"] > 0 and found["flops"] > 0 and found["bytes"] > 0 and found["rows_s"] > 0
    config, programs = PRESETS["tiny"], found["programs"]
    if workload == "generate":
        assert programs["encode"]["flops"] == pytest.approx(2 * vision_flops(config), rel=0.02)
        assert programs["prefill"]["flops"] == pytest.approx(2 * (prefill_flops(config, 96) - vision_flops(config)), rel=0.02)
        numbers = 2 * 2 * 128 * config.decoder.num_hidden_layers * config.decoder.num_key_value_heads * config.decoder.head_dim
        less = plan(*asked, "--quantize", "cache=int8")["programs"]["decode"]["argument_bytes"]  # a byte instead of two, and scales
        assert 0.8 * numbers < programs["decode"]["argument_bytes"] - less < numbers
    else:
        assert programs["step"]["flops"] > 2 * 3 * prefill_flops(config, 96) and programs["step"]["argument_bytes"] > 3 * 4 * 1.6e6


def test_what_does_not_fit(plan, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "h200", chips.Chip(1e6, 1.0, 1.0, 1.0, ""))
    found = plan("--model", "tiny", "--on", "h200", "--batch", "1", "--new", "4")
    assert not found["fits"] and found["bytes_per_chip"] > found["chip_bytes"] == 10**6


SEARCH = ["--model=tiny", "--workload=finetune", "--lora=2", "--on=h200x4", "--search", "--batches", "4", "6", "--text=8", "--new=4"]


@pytest.mark.slow
def test_search():
    """Every mesh of four chips, every remat, the batches of two that divide over it; the fastest is named."""
    command = [sys.executable, "-m", "paligemma_jax", "plan", *SEARCH]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * (6 + 3) + 1 and lines[-1].startswith("fastest: tiny LoRA 2 on h200x4") and lines[-1][9:] in lines


def test_the_fastest_as_json(plan, monkeypatch):
    """After all others, once more; none where nothing fits. What lies whole on every device for no reason is not tried."""
    from paligemma_jax.planning import plan as module
    from paligemma_jax.planning.plan import PlanResult

    made = lambda work: PlanResult(work, {}, True, 10, work.batch < 12, rows_s=1.0 if "tensor=4" in work.mesh else 2.0)
    monkeypatch.setattr(module, "plan", made)
    *plans, best = plan("--on", "h200x4", "--search", "--batches", "6", "8", "12")
    assert best == next(one for one in plans if one["rows_s"] == 2.0) | {"fastest": True} and not any("fastest" in one for one in plans)
    tried = lambda mesh: [one["work"]["batch"] for one in plans if one["work"]["mesh"] == mesh]
    assert tried("data=1,fsdp=1,tensor=4") == tried("data=1,fsdp=2,tensor=2") == [6, 8, 12] and tried("data=4,fsdp=1,tensor=1") == [8, 12]
    assert all("fastest" not in one for one in plan("--on", "h200x4", "--search", "--batches", "12"))


def test_a_checkpoint_that_is_quantized(plan, tmp_path):
    """Is planned as it is loaded."""
    convert(TINY, tmp_path / "small", "jax", quantize="nf4-32-double,embedding=int8")
    found, loaded = (parameters(model) for model in (abstract_model_by_name(str(tmp_path / "small"), "bfloat16"), load_model(tmp_path / "small", "bfloat16")))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {path: (leaf.shape, leaf.dtype) for path, leaf in loaded.items()}
    assert "codes do not learn: give --lora" in plan("--model", tmp_path / "small", "--workload", "finetune", "--on", "h200")


def test_a_mesh_of_four():
    """Each chip holds its part, and does its part of the work."""
    base = [sys.executable, "-m", "paligemma_jax", "plan", "--json", "--model", "tiny", "--on", "h200x4", "--estimate", "--text", "8", "--new", "4"]
    base += ["--workload", "finetune", "--batch", "4"]
    found = {}
    for mesh in ("fsdp=4", "data=4"):
        done = subprocess.run([*base, "--mesh", mesh], cwd=ROOT, capture_output=True, text=True, check=True)
        found[mesh] = json.loads(done.stdout)
    assert found["fsdp=4"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    whole, split = (found[mesh]["programs"]["step"] for mesh in ("data=4", "fsdp=4"))
    assert split["argument_bytes"] < 0.35 * whole["argument_bytes"] and split["flops"] == pytest.approx(whole["flops"], rel=0.05)
    assert split["sent_bytes"]["all-gather"] > 3 * whole["sent_bytes"].get("all-gather", 0)


def test_wrong_requests(plan):
    for arguments, message in [
        (["--on", "v9:2x2"], "name a chip"),
        (["--mesh", "rows=2", "--on", "h200"], "data=2,fsdp=4"),
        (["--batch", "-1"], "counts from 1"),
        (["--batch", "0"], "counts from 1"),
        (["--lora", "4"], "--lora is for --workload finetune"),
        (["--workload", "finetune", "--quantize", "nf4"], "give --lora"),
        (["--on", "h200x64"], "XLA_FLAGS"),
        (["--model", "none", "--on", "h200"], "no such checkpoint"),
    ]:
        assert message in plan("--model", "tiny", *arguments), arguments


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu(plan):
    assert "pip install 'paligemma-jax[plan]'" in plan("--model", "tiny", "--on", "v5e:2x2")


def test_the_table(tmp_path, monkeypatch):
    """Few compilations find the largest power of two that fits; what was planned is not planned again; what was not is a dash."""
    from paligemma_jax.planning import table
    from paligemma_jax.planning.plan import PlanResult, ProgramCost

    asked = []

    def plan(work):
        asked.append(work)
        fixed, row, capacity = {"3b": 2, "10b": 8, "28b": 20}[work.model.split("-")[0]] * 2**30, 2**27, 16 * 2**30
        size = fixed + 2**30 + work.batch * row
        one = ProgramCost(fixed, 2**30 + work.batch * row, 0, size, 1.0, 1.0, {}, 1.0)
        return PlanResult(work, {}, False, capacity, size <= capacity, size, programs={"step": one})

    monkeypatch.setattr(table, "apart", plan)
    found = table.cells(tmp_path / "cells.jsonl")
    assert table.cell(found["LoRA of rank 16", "3b-448", "v5e:2x4"]) == "yes: 4.0 GiB with 8 rows, 11.0 with 64"
    assert [row["work"]["batch"] for row in found["LoRA of rank 16", "3b-448", "v5e:2x4"]] == [8, 32, 64]
    assert table.cell(found["all weights, AdamW", "28b-224", "v5e:4x4"]) == "no: 23.0 of 16.0 GiB"
    assert len(asked) <= 3 * 3 * 3 * 4 * 3
    before = len(asked)
    assert table.markdown(table.cells(tmp_path / "cells.jsonl")) == table.markdown(found) and len(asked) == before


def test_a_compiler_that_brings_its_process_down(monkeypatch):
    """Is told from what does not fit; the climb goes on below."""
    from paligemma_jax.planning import table
    from paligemma_jax.planning.config import PlanConfig

    monkeypatch.setattr(table, "plan", os.abort)  # takes no argument: a TypeError comes back, as any error does
    with pytest.raises(TypeError):
        table.apart(None)
    monkeypatch.setattr(table, "plan", os._exit)
    assert table.apart(9) is None

    def ask(work):
        room = 2**34 if work.batch < 128 else 0  # from there on it is brought down
        size = work.batch * 2**26 if room else 0
        return dict(work=dict(batch=work.batch), chip_bytes=room, fits=bool(room), bytes_per_chip=size, programs=dict(step=dict(argument_bytes=0)))

    found = sorted(table.climb(PlanConfig(), ask), key=lambda row: row["work"]["batch"])
    assert [row["work"]["batch"] for row in found] == [8, 64, 128, 256]
    assert table.cell(found) == "yes: 0.5 GiB with 8 rows, 4.0 with 64 (libtpu aborted above)"
    assert table.cell(found[-1:]) == "–"


@needs_libtpu
@pytest.mark.parametrize("workload", ["generate", "finetune"])
def test_a_tpu_slice(plan, workload):
    """The TPU's own compiler; what does not fit is told by it."""
    arguments = ["--model", "tiny", "--workload", workload, "--on", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--text", "8", "--new", "4"]
    found = plan(*arguments, "--batch", "4")
    assert found["fits"] and not found["estimate"] and found["chip_bytes"] == 15.75 * 2**30
    estimate = plan(*arguments, "--batch", "4", "--on", "h200x4") if len(jax.devices("cpu")) >= 4 else None
    assert estimate is None or found["flops"] == pytest.approx(estimate["flops"], rel=0.1)
    large = plan(*arguments, "--batch", "40000")
    assert not large["fits"] and large["bytes_per_chip"] > large["chip_bytes"]


@needs_libtpu
def test_slices_that_there_are():
    from paligemma_jax.planning import plan

    assert [len(plan._devices(chips.find_slice(on), False)) for on in ("v5e:1x1", "v6e:1x1", "v5p:2x2x1")] == [1, 1, 4]
    with pytest.raises(ValueError, match="--on v5e:3x3"):
        plan._devices(chips.find_slice("v5e:3x3"), False)
