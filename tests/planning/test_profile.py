"""Names, lines and costs of the operations of TPU programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from paligemma_jax.planning.chips import CHIPS
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.cost import ProgramCost
from paligemma_jax.planning.hlo import Program
from paligemma_jax.planning.plan import PlanResult
from paligemma_jax.planning.profile import OperationCost, operation_costs, source_lines
from paligemma_jax.planning.report import describe

TABLES = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/user/train.py"
2 "/src/paligemma_jax/model/decoder.py"
3 "/src/paligemma_jax/model/layers.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=73 end_line=75 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=88 end_line=88 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=3 parent_frame_id=2}

"""
LAYER = """
  %copy-start.{n} = (bf16[1024,1024]{{1,0:T(8,128)(2,1)S(1)}}, bf16[1024,1024]{{1,0}}, u32[]) \
copy-start(%w)
  %copy-done.{n} = bf16[1024,1024]{{1,0:T(8,128)(2,1)S(1)}} copy-done(%copy-start.{n})
  %transposed.{n} = bf16[1024,1024]{{0,1:T(8,128)(2,1)S(1)}} copy(%copy-done.{n}), \
backend_config={{"estimated_cycles":"4000"}}
  %product.{n} = bf16[8,1024]{{1,0:T(8,128)(2,1)S(1)}} fusion(%x, %transposed.{n}), calls=%dot, \
metadata={{op_name="jit(step)/{scope}/layers/{n}/mlp/...i,oi->...o/dot_general" \
stack_frame_id={frame}}}, backend_config={{"estimated_cycles":"9000"}}"""
CHIP = CHIPS["v5e"]


def costs(*layers: str) -> list[OperationCost]:
    lines = ["ENTRY %main (x: bf16[8,1024], w: bf16[1024,1024]) -> bf16[8,1024] {"]
    lines += ["  %x = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)"]
    lines += ["  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)", *layers, "}"]
    text = TABLES + "\n".join(lines)
    return operation_costs(Program.parse(text), source_lines(text), CHIP)


def test_layers_are_summed_and_prefetches_count_where_they_are_used():
    """A prefetch, which the compiler does not name, counts with the product that it is for."""
    scope = {"scope": "while/body/decoder", "frame": 3}
    product, copy = costs(*(LAYER.format(n=n, **scope) for n in range(3)))
    matrix = 2 * 1024 * 1024
    assert (product.name, copy.name) == (
        "decoder/layers/mlp/dot_general",
        "decoder/layers/mlp/copy",
    )
    assert (product.bytes, product.cycles) == (3 * matrix, 3 * 9000)
    assert (copy.bytes, copy.cycles) == (0, 3 * 4000)


@pytest.mark.parametrize(
    "scope, name",
    [
        ("jvp(decoder)", "decoder/layers/mlp/dot_general"),
        ("transpose(jvp(decoder))", "decoder/layers/mlp/dot_general (backward)"),
        (
            "transpose(jvp(decoder))/while/body/checkpoint/rematted_computation",
            "decoder/layers/mlp/dot_general (recomputed)",
        ),
    ],
)
def test_names_in_training(scope, name):
    assert costs(LAYER.format(n=7, scope=scope, frame=3))[0].name == name


@pytest.mark.parametrize("frame, line", [(3, "decoder.py:73"), (2, "decoder.py:73"), (1, "")])
def test_the_line_that_calls_a_building_block(frame, line):
    """`model/layers.py` computes all products: the line that calls it tells which."""
    product = costs(LAYER.format(n=0, scope="decoder", frame=frame))[0]
    assert product.line == (line and f"paligemma_jax/model/{line}")


def test_without_a_caller_the_building_block_is_named():
    product = costs(LAYER.format(n=0, scope="decoder", frame=4))[0]
    assert product.line == "paligemma_jax/model/layers.py:88"


def test_kernels_cost_what_they_declare():
    """The compiler does not estimate them."""
    text = (Path(__file__).parent / "tpu_layers.txt").read_text()
    operations = operation_costs(Program.parse(text), source_lines(text), CHIP)
    kernel = next(operation for operation in operations if "pallas_call" in operation.name)
    assert kernel.seconds == pytest.approx(4 * 2 * 1024**3 / CHIP.flops)
    assert kernel.cycles == pytest.approx(kernel.seconds * CHIP.clock) and kernel.bytes == 0


def test_operations_without_an_estimate():
    """The compiler writes the largest integer, for example for a gather on another core."""
    unknown = LAYER.replace("9000", str(2**63 - 1)).format(n=0, scope="decoder", frame=3)
    assert sum(operation.cycles for operation in costs(unknown)) == 4000


def test_the_table_of_a_profile():
    """Numbers, operations and lines in columns, at most 100 wide."""
    slow = OperationCost("layers/" * 20 + "softmax", "paligemma_jax/model/a.py:7", 2e9, 3e6, 4e-3)
    fast = OperationCost("pad", "", 1e7, 0.0, 1e-5)
    cost = ProgramCost(0, 0, 0, 0, 1e12, 2e9, {}, 3e6, 1.0, 2e-3, 4e-3, [slow, fast])
    config = PlanConfig(profile=True, batch=8)
    result = PlanResult(config, {}, False, 16 * 2**30, True, 2**30, programs={"decode": cost})
    *_, header, first, second = describe(result).splitlines()
    assert " ".join(header.split()) == (
        "ms moved GB cycles M operation of decode line of paligemma_jax/"
    )
    assert first.split()[:3] == ["4.00", "2.00", "3.00"] and first.endswith("softmax  model/a.py:7")
    assert second.split() == ["0.01", "0.01", "0.00", "pad"]
    assert max(len(header), len(first)) <= 100
