"""`paligemma-jax bench`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from paligemma_jax.commands.options import Depth, File, Names, Numbers, dumps, require_parent

Dtype = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: float32 on a CPU, else bfloat16)")]
Formats = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FORMAT [FORMAT ...]")]


def bench(
    model: Names = ("tiny",),
    batch: Numbers = (1,),
    prompt: Numbers = (32,),
    new: int = 64,
    layers: tuple[Literal["list", "stack"], ...] = ("list",),
    cached: Numbers = (),
    against: tuple[Literal["transformers", "transformers-compile"], ...] = (),
    dtype: Dtype = None,
    quantize: Formats = (),
    depth: Depth = None,
    repeats: int = 5,
    train: tuple[Literal["all", "lora", "qlora"], ...] = (),
    remat: Literal["none", "full", "dots"] = "none",
    chart: File = None,
    json: bool = False,
) -> None:
    """Measure speed against what the machine can do, and against transformers.

    Example: paligemma-jax bench --model 3b-224 --batch 1 8 --dtype bfloat16

    Args:
        model: A preset (3b-224, 10b-448, 28b-896, pg1-3b-224, ...) or "small" with random weights, or a checkpoint as for generate.
        batch: Rows at a time.
        prompt: Text tokens after those of the image (256 at 224 pixels).
        new: Tokens to generate.
        layers: How the layers are held: list (compiled one by one) or stack (compiled once, looped over).
        cached: Decode also with so many tokens in the cache, to see what each costs.
        against: transformers, transformers-compile (with torch.compile): the same weights, dtype and inputs, in turn.
        dtype: float32, bfloat16 or float16.
        quantize: What to hold in 8 or 4 bits, each in turn: none int8 nf4 "nf4-32,embedding=int8,cache=int8".
        depth: Only so many layers in each tower, at full width, where both models would not fit into memory.
        repeats: Runs after the first, which warms up.
        train: Measure training steps instead: of all weights, of LoRA, of LoRA on nf4. With --repeats 0 only compile, and tell the memory.
        remat: What of each layer such a step computes again in its backward pass: nothing, all, or all but the products with weights.
        chart: Draw tokens/s to this file, as in speed.png.
        json: Print one JSON object instead of the table; times in seconds.
    """
    require_parent("--chart", chart)
    if chart and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("to draw a chart, install the extra: pip install 'paligemma-jax[bench]'")
    if chart and (train or Path(chart).suffix not in (".png", ".svg", ".pdf")):
        raise ValueError(f"--chart {chart}: {'it shows answering alone, leave out --train' if train else 'name it .png, .svg or .pdf'}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part of a GPU
    from paligemma_jax.bench import report as reports
    from paligemma_jax.bench import training
    from paligemma_jax.bench.generation import BenchConfig, run

    plan = BenchConfig(model, batch, prompt, new, layers, cached, against, dtype, quantize, depth, repeats, train, remat)
    report = training.run(plan) if train else run(plan)
    print(dumps(report) if json else reports.table(report))
    if chart:
        reports.chart(report, chart)
