"""`paligemma-jax bench`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import tyro

from paligemma_jax.bench.config import BenchConfig
from paligemma_jax.commands.options import File, dumps, require_parent


def bench(
    config: Annotated[BenchConfig, tyro.conf.arg(name="")] = BenchConfig(),
    chart: File = None,
    json: bool = False,
) -> None:
    """Measure speed, relative to the limits of the machine and to transformers.

    Example: paligemma-jax bench --model 3b-224 --batch 1 8 --dtype bfloat16

    Args:
        chart: Draw a bar chart of tokens/s to this file, such as speed.png.
        json: Print one JSON object instead of the table, with times in seconds.
    """
    if chart:
        _check_chart(chart, config)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
    from paligemma_jax.bench import generation, report, training

    measured = training.run(config) if config.train else generation.run(config)
    print(dumps(measured) if json else report.table(measured))
    if chart:
        report.chart(measured, chart)


def _check_chart(chart: str, config: BenchConfig) -> None:
    require_parent("--chart", chart)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--chart requires matplotlib: pip install 'paligemma-jax[bench]'")
    if config.train:
        raise ValueError("--chart draws generation only: leave out --train")
    if Path(chart).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--chart must end in .png, .svg or .pdf, got {chart}")
