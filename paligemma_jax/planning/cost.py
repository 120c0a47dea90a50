"""What a compiled program costs on each chip: memory, work and time."""

from __future__ import annotations

from dataclasses import dataclass, field

from jax.stages import Compiled

from paligemma_jax.planning.chips import Slice
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.hlo import Program
from paligemma_jax.planning.profile import OperationCost, operation_costs, source_lines
from paligemma_jax.planning.work import program_work
from paligemma_jax.sharding.devices import program_bytes

COSTLIEST = 10  # operations that `PlanConfig.profile` lists


@dataclass(frozen=True)
class ProgramCost:
    """Memory, work and time of one compiled program on each chip."""

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int  # of results that do not reuse the memory of an argument
    memory_bytes: int  # in total
    flops: float
    bytes: float  # moved from and to memory
    sent_bytes: dict[str, float]  # to other chips, by kind of collective
    cycles: float  # by the TPU compiler's estimate; 0 from the CPU compiler
    compile_seconds: float
    min_seconds: float  # lower bound at the chip's published rates
    seconds: float  # estimate: the compiler's cycles, or the lower bound where that is longer
    costliest: list[OperationCost] = field(default_factory=list)  # with `PlanConfig.profile`


def program_cost(program: Compiled, config: PlanConfig, compile_seconds: float) -> ProgramCost:
    """Return the cost of a program that was compiled for a plan.

    The traffic of a TPU program is that of its operations. The CPU compiler's operations are unlike
    those of the chip: with it, arguments and results count once, and temporaries twice.
    """
    chip = Slice.parse(config.on).chip
    text = program.as_text() or ""
    parsed = Program.parse(text)
    work, memory = program_work(parsed), program_bytes(program)
    operations = [] if config.estimated else operation_costs(parsed, source_lines(text), chip)
    moved = sum(operation.bytes for operation in operations)
    if config.estimated:
        moved = memory["argument_bytes"] + memory["output_bytes"] + 2 * memory["temporary_bytes"]
    # The matrix units multiply int8 at twice the rate of bfloat16.
    bound = max(
        (work.flops - work.int8_flops / 2) / chip.flops,
        moved / chip.bandwidth,
        sum(work.sent_bytes.values()) / chip.links,
    )
    cycles = sum(operation.cycles for operation in operations)
    return ProgramCost(
        **memory,
        flops=work.flops,
        bytes=moved,
        sent_bytes=work.sent_bytes,
        cycles=cycles,
        compile_seconds=compile_seconds,
        min_seconds=bound,
        seconds=max(bound, cycles / chip.clock) if cycles else bound,
        costliest=operations[:COSTLIEST] if config.profile else [],
    )
