"""The published sizes on TPU slices: what fits, how much of a chip it takes, the largest batch. Every plan is kept in a file: all take hours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paligemma_jax.planning import chips
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.plan import PlanResult, plan

SLICES = ("v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x2")
MODELS = tuple(f"{size}-{side}" for size, side in product(("3b", "10b", "28b"), (224, 448, 896)))
KINDS = {  # a stack everywhere: a list of 46 layers takes the compiler many times as long
    "generate, bfloat16": PlanConfig(workload="generate", layers="stack"),
    "LoRA of rank 16": PlanConfig(workload="finetune", lora=16),
    "all weights, AdamW": PlanConfig(workload="finetune"),
}
MOST = 256  # rows
PlanTableRow = dict[str, Any]  # a `Plan`, as JSON keeps it


def cells(file: Path) -> dict[tuple[str, str, str], list[PlanTableRow]]:
    """The plans of every cell (kind, model, slice), smallest batch first; those that are missing in `file` are made."""
    known = {_key(row["work"]): row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}

    def ask(work: PlanConfig) -> PlanTableRow:
        if (row := known.get(_key(asdict(work)))) is None:
            row = known[_key(asdict(work))] = asdict(apart(work) or PlanResult(work, {}, False, 0))
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
        return row

    found = {}
    for kind, model, on in tqdm(list(product(KINDS, MODELS, SLICES)), unit="cell", disable=None):
        plans = climb(replace(KINDS[kind], model=model, on=on), ask)
        found[kind, model, on] = sorted(plans, key=lambda row: row["work"]["batch"])
    return found


def apart(work: PlanConfig) -> PlanResult | None:
    """`plan` in a process of its own; None where the compiler brought that down, as libtpu does on shapes that it cannot lay out."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(plan, work).result()
        except BrokenProcessPool:
            return None


def climb(work: PlanConfig, ask: Callable[[PlanConfig], PlanTableRow]) -> Iterator[PlanTableRow]:
    """Plans of one row a chip, and if that fits of larger batches, in powers of two, up to the largest that does. Few compilations:

    what is no argument is taken to grow with the rows; from the second plan on, memory is read off the line through the last two.
    """
    batch = chips.find_slice(work.on).count
    yield (row := ask(replace(work, batch=batch)))
    fixed = max((one["argument_bytes"] for one in row["programs"].values()), default=0)
    before, tried = (0, fixed), {batch}
    while row["fits"]:
        rate = (row["bytes_per_chip"] - before[1]) / (batch - before[0])
        room = batch + (row["chip_bytes"] - row["bytes_per_chip"]) / max(rate, 1)
        larger = batch
        while 2 * larger <= min(room, MOST):
            larger *= 2
        if larger in tried:
            return
        before, batch = (batch, row["bytes_per_chip"]), larger
        tried.add(batch)
        yield (row := ask(replace(work, batch=batch)))
    while not row["fits"] and batch // 2 not in tried and len(tried) > 1:
        batch //= 2
        tried.add(batch)
        yield (row := ask(replace(work, batch=batch)))


def markdown(found: dict[tuple[str, str, str], list[PlanTableRow]]) -> str:
    """A table of every kind: models down, slices across."""
    parts = []
    for kind in KINDS:
        parts += [f"| {kind} | {' | '.join(SLICES)} |", "| --- " * (len(SLICES) + 1) + "|"]
        parts += [f"| {model} | {' | '.join(cell(found[kind, model, on]) for on in SLICES)} |" for model in MODELS] + [""]
    return "\n".join(parts)


def cell(plans: list[PlanTableRow]) -> str:
    """ "yes: 3.2 GiB with 8 rows, 11.0 with 64", "no: 20.1 of 15.8 GiB", or a dash for what was not compiled or could not be."""
    whole = [row for row in plans if row["chip_bytes"]]
    if not whole:
        return "–"
    aborted, plans = len(whole) < len(plans), whole
    gib = lambda row: f"{row['bytes_per_chip'] / 2**30:.1f}"
    fitting = [row for row in plans if row["fits"]]
    if not fitting:
        return f"no: {gib(plans[0])} of {plans[0]['chip_bytes'] / 2**30:.1f} GiB" if plans[0]["bytes_per_chip"] else "no"
    first, last = fitting[0], fitting[-1]
    more = f", {gib(last)} with {last['work']['batch']}" if last is not first else ""
    beyond = " (or more)" if 2 * last["work"]["batch"] > MOST else " (libtpu aborted above)" if aborted else ""
    return f"yes: {gib(first)} GiB with {first['work']['batch']} rows{more}{beyond}"


def _key(work: PlanTableRow) -> str:
    return json.dumps(work, sort_keys=True)
