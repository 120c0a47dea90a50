"""Print plans."""

from __future__ import annotations

from collections.abc import Sequence

from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.plan import PlanResult
from paligemma_jax.planning.programs import ProgramCost

GIB = 2**30
HEADER = (
    *("", "arguments", "temporaries", "results", "total GiB", "TFLOP", "moved GB", "sent GB"),
    *("min. ms", "compile s"),
)
NOTE = """\
Memory is in GiB per chip. TFLOP: matrix products. moved: traffic to and from memory (arguments,
results and temporaries at least once). sent: traffic to other chips. min. ms: the slowest of these
three at the chip's published rates. decode: one more token for each row."""


def summary(result: PlanResult) -> str:
    """Return one line: workload, mesh, whether it fits, and the highest possible rate."""
    config = result.config
    mesh = ",".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    remat = f", remat {config.remat}" if config.training else ""
    verdict = "fits" if result.fits else "does not fit"
    memory = "more than a chip has"
    if result.bytes_per_chip:
        needed, available = result.bytes_per_chip / GIB, result.chip_bytes / GIB
        memory = f"{needed:.1f} of {available:.1f} GiB per chip"
    estimate = " (estimate)" if result.estimate else ""
    rate = f"; at most {result.rows_s:.3g} rows/s" if result.fits else ""
    return (
        f"{config.model} {_workload(config)} on {config.on}, {mesh or 'one chip'}, "
        f"batch {config.batch}{remat}: {verdict}, {memory}{estimate}{rate}"
    )


def _workload(config: PlanConfig) -> str:
    quantized = f" on {config.quantize}" if config.quantize else ""
    if not config.training:
        return config.workload + quantized
    return (
        f"LoRA {config.lora}" if config.lora else f"all weights, {config.optimizer}"
    ) + quantized


def describe(result: PlanResult) -> str:
    """Return the summary and a table of the programs."""
    if not result.programs:
        return summary(result)
    lines = [HEADER, *(_cells(name, cost) for name, cost in result.programs.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join([summary(result), *table, NOTE])


def _cells(name: str, cost: ProgramCost) -> tuple[str, ...]:
    sizes = (cost.argument_bytes, cost.temporary_bytes, cost.output_bytes, cost.memory_bytes)
    sent = sum(cost.sent_bytes.values())
    work = (cost.flops / 1e12, cost.bytes / 1e9, sent / 1e9, 1000 * cost.seconds)
    return (
        name,
        *(f"{size / GIB:.2f}" for size in sizes),
        *(f"{value:.3g}" for value in work),
        f"{cost.compile_seconds:.0f}",
    )


def fastest(results: Sequence[PlanResult]) -> PlanResult | None:
    """Return the fastest result that fits."""
    fitting = (result for result in results if result.fits)
    return max(fitting, key=lambda result: result.rows_s, default=None)
