"""`paligemma-jax plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from paligemma_jax.commands.options import File, dumps
from paligemma_jax.planning.chips import Slice, simulate_devices
from paligemma_jax.planning.config import PlanConfig

Batches = Annotated[
    tuple[int, ...],
    tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="(default: the value of --batch)"),
]


def plan(
    config: Annotated[PlanConfig, tyro.conf.arg(name="")] = PlanConfig(),
    search: bool = False,
    batches: Batches = (),
    table: File = None,
    json: bool = False,
) -> None:
    """Plan what fits on accelerators, and how fast it runs, without access to them.

    Example: paligemma-jax plan --model 28b-224 --batch 4 --on v5e:2x4

    Args:
        search: Try every mesh of the chips, every --remat and all --batches, and report the
            fastest that fits.
        batches: Batch sizes to try with --search.
        table: Plan the published sizes on four TPU slices instead, and print the tables. Plans are
            saved in this file, and a second run continues from it.
        json: Print one JSON object per plan. With --search, the last one repeats the fastest plan
            that fits, with "fastest": true.
    """
    simulate_devices(Slice.parse(config.on).count)
    if table:
        from paligemma_jax.planning.table import markdown, plan_table

        print(markdown(plan_table(Path(table))))
        return
    from paligemma_jax.planning import plan, report

    results = []
    for result in plan.search(config, batches) if search else [plan.plan(config)]:
        results.append(result)
        text = report.summary(result) if search else report.describe(result)
        print(dumps(asdict(result)) if json else text, flush=True)
    if not search:
        return
    best = report.fastest(results)
    if best and json:
        print(dumps(asdict(best) | {"fastest": True}))
    elif not json:
        print(f"fastest: {report.summary(best)}" if best else "nothing fits")
