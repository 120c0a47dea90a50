"""The tables of the published sizes: few plans, none twice, and compilers that crash."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
from support.mutations import mutations

from paligemma_jax.planning import table
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.cost import ProgramCost
from paligemma_jax.planning.plan import PlanResult

GIB = 2**30


def test_few_plans_find_the_largest_batch(tmp_path, monkeypatch):
    """The result is the largest power of two that fits, and no plan is repeated."""
    planned = []

    def plan(config):
        planned.append(config)
        weights = {"3b": 2, "10b": 8, "28b": 20}[config.model.split("-")[0]] * GIB
        temporaries = GIB + config.batch * 2**27
        size, capacity = weights + temporaries, 16 * GIB
        cost = ProgramCost(weights, temporaries, 0, size, 1.0, 1.0, {}, 0.0, 1.0, 1.0, 1.0)
        fits = size <= capacity
        return PlanResult(config, {}, False, capacity, fits, size, programs={"step": cost})

    monkeypatch.setattr(table, "plan_in_subprocess", plan)
    cells = table.plan_table(tmp_path / "cells.jsonl")
    results = cells["LoRA of rank 16", "3b-448", "v5e:2x4"]
    assert table.format_cell(results) == "yes: 4.0 GiB with 8 rows, 11.0 with 64"
    assert [result.config.batch for result in results] == [8, 32, 64]
    too_large = cells["all weights, AdamW", "28b-224", "v5e:4x4"]
    assert table.format_cell(too_large) == "no: 23.0 of 16.0 GiB"
    assert len(planned) <= 3 * 3 * 3 * 4 * 3
    count = len(planned)
    again = table.plan_table(tmp_path / "cells.jsonl")
    assert again == cells and table.markdown(again) == table.markdown(cells)
    assert len(planned) == count


def test_a_compiler_that_aborts_its_process(monkeypatch):
    """An abort does not count as a program that does not fit: smaller batches are still tried."""
    monkeypatch.setattr(table, "plan", os.abort)  # takes no argument: errors are passed on
    with pytest.raises(TypeError):
        table.plan_in_subprocess(None)
    monkeypatch.setattr(table, "plan", os._exit)
    assert table.plan_in_subprocess(9) is None

    def plan_once(config):
        aborted = config.batch >= 128
        size = 0 if aborted else config.batch * 2**26
        return PlanResult(config, {}, False, 0 if aborted else 2**34, not aborted, size)

    results = sorted(table.plan_batches(PlanConfig(), plan_once), key=lambda r: r.config.batch)
    assert [result.config.batch for result in results] == [8, 64, 128, 256]
    expected = "yes: 0.5 GiB with 8 rows, 4.0 with 64 (libtpu aborted above)"
    assert table.format_cell(results) == expected
    assert table.format_cell(results[-1:]) == "–"


def test_plans_of_any_json_are_read_or_refused():
    """A line of the table's file is a plan, or an error of one line."""
    result = PlanResult(PlanConfig(), {"data": 1}, False, 1, programs={})
    line = json.dumps(asdict(result))
    assert PlanResult.from_json(line) == result
    for text in mutations(json.loads(line)):
        try:
            PlanResult.from_json(text)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
