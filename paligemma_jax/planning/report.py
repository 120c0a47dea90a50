"""Plans as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from paligemma_jax.planning.plan import PlanResult

GIB = 2**30
NOTE = """GiB on each chip. TFLOP, moved and sent GB: of products, of memory (arguments, results and temporaries at least once), to other chips.
At best: the slowest of the three at the chip's published rates. decode: one more token of every row."""


def line(plan: PlanResult) -> str:
    """Work, mesh, whether it fits, the best rate."""
    work = plan.work
    what = work.workload if not work.training else f"LoRA {work.lora}" if work.lora else f"all weights, {work.optimizer}"
    what += f" on {work.quantize}" if work.quantize else ""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    remat = f", remat {work.remat}" if work.training else ""
    needs = f"{plan.bytes_per_chip / GIB:.1f} of {plan.chip_bytes / GIB:.1f} GiB a chip" if plan.bytes_per_chip else "more than the chip has"
    rate = f"; at best {plan.rows_s:.3g} rows/s" if plan.fits else ""
    fits = "fits" if plan.fits else "does not fit"
    return f"{work.model} {what} on {work.on}, {mesh}, batch {work.batch}{remat}: {fits}, {needs}{' (estimate)' if plan.estimate else ''}{rate}"


def text(plan: PlanResult) -> str:
    """`line`, and a table of the programs."""
    rows: list[tuple[str, ...]] = [("", "arguments", "temporaries", "results", "GiB", "TFLOP", "moved", "sent", "at best ms", "compile s")]
    for name, one in plan.programs.items():
        sizes = (one.argument_bytes, one.temporary_bytes, one.output_bytes, one.memory_bytes)
        work = (one.flops / 1e12, one.bytes / 1e9, sum(one.sent_bytes.values()) / 1e9, 1000 * one.seconds)
        rows.append((name, *(f"{size / GIB:.2f}" for size in sizes), *(f"{value:.3g}" for value in work), f"{one.compile_seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([line(plan), *(table if plan.programs else []), *([NOTE] if plan.programs else [])])


def best(plans: Sequence[PlanResult]) -> PlanResult | None:
    """The fastest that fits."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.rows_s, default=None)
