"""Tables of the published sizes on TPU slices: what fits, its memory, and the largest batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.planning.chips import Slice
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.plan import PlanResult, plan

SLICES = ("v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x2")
MODELS = tuple(f"{size}-{side}" for size, side in product(("3b", "10b", "28b"), (224, 448, 896)))
WORKLOADS = {  # stacked everywhere: a list of 46 layers takes many times as long to compile
    "generate, bfloat16": PlanConfig(workload="generate", layers="stack"),
    "LoRA of rank 16": PlanConfig(workload="finetune", lora=16),
    "all weights, AdamW": PlanConfig(workload="finetune"),
}
MAX_BATCH = 256

Cells = dict[
    tuple[str, str, str], list[PlanResult]
]  # by workload, model, slice; smallest batch first


def plan_table(file: Path) -> Cells:
    """Plan every cell of the tables, which takes hours.

    Every plan is appended to `file` as a line of JSON. Plans that it contains are not repeated.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    known = {result.config: result for result in map(PlanResult.from_json, lines)}

    def plan_once(config: PlanConfig) -> PlanResult:
        if config not in known:
            known[config] = plan_in_subprocess(config) or PlanResult(config, {}, False, 0)
            with file.open("a") as out:
                out.write(json.dumps(asdict(known[config])) + "\n")
        return known[config]

    cells = {}
    combinations = list(product(WORKLOADS, MODELS, SLICES))
    for workload, model, on in progress_bar(combinations, "plan", unit="cell"):
        config = replace(WORKLOADS[workload], model=model, on=on)
        results = plan_batches(config, plan_once)
        cells[workload, model, on] = sorted(results, key=lambda result: result.config.rows)
    return cells


def plan_in_subprocess(config: PlanConfig) -> PlanResult | None:
    """Plan in a subprocess. Return None if the compiler aborts it: libtpu does on some shapes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(plan, config).result()
        except BrokenProcessPool:
            return None


def plan_batches(
    config: PlanConfig, plan_once: Callable[[PlanConfig], PlanResult]
) -> Iterator[PlanResult]:
    """Plan one row per chip and, if that fits, larger powers of two up to the largest that fits.

    To compile few programs, the next batch is extrapolated from a line of memory over batch size:
    first through the arguments alone at batch 0, then through the last two plans.
    """
    batch = Slice.parse(config.on).count
    result = plan_once(replace(config, batch=batch))
    yield result
    tried = {batch}
    previous = 0, max((cost.argument_bytes for cost in result.programs.values()), default=0)
    while result.fits:
        slope = (result.bytes_per_chip - previous[1]) / (batch - previous[0])
        limit = batch + (result.chip_bytes - result.bytes_per_chip) / max(slope, 1)
        previous = batch, result.bytes_per_chip
        while 2 * batch <= min(limit, MAX_BATCH):
            batch *= 2
        if batch in tried:
            return
        tried.add(batch)
        result = plan_once(replace(config, batch=batch))
        yield result
    while not result.fits and batch // 2 not in tried and len(tried) > 1:
        batch //= 2
        tried.add(batch)
        result = plan_once(replace(config, batch=batch))
        yield result


def markdown(cells: Cells) -> str:
    """Return one table per workload, with models as rows and slices as columns."""
    lines = []
    for workload in WORKLOADS:
        lines += [f"| {workload} | {' | '.join(SLICES)} |", "| --- " * (len(SLICES) + 1) + "|"]
        for model in MODELS:
            texts = [format_cell(cells[workload, model, on]) for on in SLICES]
            lines.append(f"| {model} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def format_cell(results: list[PlanResult]) -> str:
    """Return "yes: 3.2 GiB with 8 rows, 11.0 with 64", "no: 20.1 of 15.8 GiB", or a dash if nothing
    was compiled."""
    compiled = [result for result in results if result.chip_bytes]
    if not compiled:
        return "–"

    def gib(size: int) -> str:
        return f"{size / 2**30:.1f}"

    fitting = [result for result in compiled if result.fits]
    if not fitting:
        needed, available = compiled[0].bytes_per_chip, compiled[0].chip_bytes
        return f"no: {gib(needed)} of {gib(available)} GiB" if needed else "no"
    first, last = fitting[0], fitting[-1]
    text = f"yes: {gib(first.bytes_per_chip)} GiB with {first.config.batch} rows"
    if last is not first:
        text += f", {gib(last.bytes_per_chip)} with {last.config.batch}"
    if 2 * last.config.rows > MAX_BATCH:
        return text + " (or more)"
    return text + " (libtpu aborted above)" if len(compiled) < len(results) else text
