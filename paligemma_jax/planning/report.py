"""Print plans."""

from __future__ import annotations

from collections.abc import Sequence

from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.plan import PlanResult
from paligemma_jax.planning.programs import ProgramCost

GIB = 2**30
MAX_WIDTH = 100
HEADER = (
    *("", "arguments", "temporaries", "results", "total GiB", "TFLOP", "moved GB", "sent GB"),
    *("min. ms", "est. ms"),
)
NOTE = """\
Memory is in GiB per chip. TFLOP: matrix products. moved: traffic from and to memory. sent: traffic
to other chips. min. ms: the slowest of these three at the chip's published rates. decode: one more
token for each row."""
TPU_NOTE = """
est. ms: the compiler's cycles, or min. ms where that is longer."""
CPU_NOTE = """
The CPU compiler's programs: moved is arguments, results and temporaries at least once."""


def summary(result: PlanResult) -> str:
    """Return one line: workload, mesh, whether it fits, and the rate."""
    config = result.config
    mesh = ",".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    remat = f", remat {config.remat}" if config.training else ""
    verdict = "fits" if result.fits else "does not fit"
    memory = "more than a chip has"
    if result.bytes_per_chip:
        needed, available = result.bytes_per_chip / GIB, result.chip_bytes / GIB
        memory = f"{needed:.1f} of {available:.1f} GiB per chip"
    estimate = " (estimate)" if result.estimate else ""
    limit = "at most" if result.estimate else "about"
    rate = f"; {limit} {result.rows_s:.3g} rows/s" if result.fits else ""
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
    """Return the summary, a table of the programs and, if asked for, their costliest operations."""
    if not result.programs:
        return summary(result)
    lines = [HEADER, *(_cells(name, cost) for name, cost in result.programs.items())]
    if result.estimate:
        lines = [line[:-1] for line in lines]
    note = NOTE + (CPU_NOTE if result.estimate else TPU_NOTE)
    profiles = [
        _profile(name, cost) for name, cost in result.programs.items() if result.config.profile
    ]
    return "\n".join([summary(result), *_aligned(lines), note, *profiles])


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def _cells(name: str, cost: ProgramCost) -> tuple[str, ...]:
    sizes = (cost.argument_bytes, cost.temporary_bytes, cost.output_bytes, cost.memory_bytes)
    work = (cost.flops / 1e12, cost.bytes / 1e9, sum(cost.sent_bytes.values()) / 1e9)
    return (
        name,
        *(f"{size / GIB:.2f}" for size in sizes),
        *(f"{value:.3g}" for value in (*work, 1000 * cost.min_seconds, 1000 * cost.seconds)),
    )


def _profile(name: str, cost: ProgramCost) -> str:
    """A table of the costliest operations of a program."""
    numbers = [("ms", "moved GB", "cycles M")]
    numbers += [
        (f"{1000 * row.seconds:.2f}", f"{row.bytes / 1e9:.2f}", f"{row.cycles / 1e6:.2f}")
        for row in cost.costliest
    ]
    places = ["line of paligemma_jax/"]
    places += [row.line.removeprefix("paligemma_jax/") for row in cost.costliest]
    cells = _aligned(numbers)
    limit = MAX_WIDTH - len(cells[0]) - max(map(len, places)) - 4
    names = [f"operation of {name}"]
    names += [row.name if len(row.name) <= limit else row.name[-limit:] for row in cost.costliest]
    width = max(map(len, names))
    rows = zip(cells, names, places, strict=True)
    return "\n".join(["", *(f"{left}  {name:{width}}  {place}" for left, name, place in rows)])


def fastest(results: Sequence[PlanResult]) -> PlanResult | None:
    """Return the fastest result that fits."""
    fitting = (result for result in results if result.fits)
    return max(fitting, key=lambda result: result.rows_s, default=None)
