"""`paligemma-jax plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from paligemma_jax.commands.options import File, Numbers, dumps
from paligemma_jax.planning import chips
from paligemma_jax.planning.config import PlanConfig


def plan(
    work: Annotated[PlanConfig, tyro.conf.arg(name="")] = PlanConfig(),
    search: bool = False,
    batches: Numbers = (),
    table: File = None,
    json: bool = False,
) -> None:
    """See what fits chips that nobody has to own, and how fast it can be.

    Example: paligemma-jax plan --model 28b-224 --batch 4 --on v5e:2x4

    Args:
        search: Try every mesh of the chips, with --batches and every --remat, and name the fastest that fits.
        batches: With --search: rows at a time to try; by default --batch.
        table: Instead, plan the published sizes on four slices, keep every plan in this file, go on with those that it has, and print the tables.
        json: Print one JSON object a plan, and after a --search once more the fastest that fits, with "fastest".
    """
    chips.prepare(chips.find_slice(work.on).count)
    if table:
        from paligemma_jax.planning import table

        print(table.markdown(table.cells(Path(table))))
        return
    from paligemma_jax.planning import plan, report

    found = []
    for one in plan.search(work, batches) if search else [plan.plan(work)]:
        found.append(one)
        print(dumps(asdict(one)) if json else report.line(one) if search else report.text(one), flush=True)
    if search and (best := report.best(found)):
        print(dumps(asdict(best) | {"fastest": True}) if json else f"fastest: {report.line(best)}")
    elif search and not json:
        print("nothing fits")
