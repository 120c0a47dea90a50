"""The speed of 3b on an accelerator, as a table. Run from the root of the repository:

    python -m tools.gpu_tables --output speed.jsonl

Weights are random. Rows are printed and appended to the file as they are measured. A case that
fails is one line, and after `--seconds` no case starts: those that matter most come first.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from paligemma_jax.bench.clock import Record
from paligemma_jax.bench.config import BenchConfig


@dataclass(frozen=True)
class Group:
    """Cases that share their weights."""

    model: str
    batches: tuple[int, ...] = (1, 8)
    layers: Literal["list", "stack"] = "stack"  # compiles in a fraction of the time of a list
    quantize: str | None = None
    attention: str | None = None  # by default the fastest
    against: tuple[Literal["transformers", "transformers-compile"], ...] = ()
    train: tuple[Literal["lora"], ...] = ()


GROUPS = (
    Group("3b-224", (1, 8, 32)),
    Group("3b-448"),
    Group("3b-896"),
    Group("3b-224", quantize="int8"),
    Group("3b-224", quantize="nf4"),
    Group("3b-224", layers="list"),
    Group("3b-448", (8,), attention="plain"),
    Group("3b-224", (8,), quantize="w8a8"),
    Group("3b-224", (1,), "list", against=("transformers", "transformers-compile")),
    Group("3b-224", (8,), train=("lora",)),
    Group("3b-224", (8,), "list", against=("transformers", "transformers-compile")),
)
CASE = ("model", "quantize", "layers", "attention", "batch")  # keys of the first columns
HEADER = (
    *(
        "model",
        "weights",
        "layers",
        "attention",
        "rows",
        "by",
        "first token or step, ms",
        "TFLOP/s",
    ),
    *("decode tokens/s", "GB/s", "GiB", "compile s"),
)


def run(
    output: str,
    seconds: float = 330,
    groups: tuple[int, ...] = tuple(range(len(GROUPS))),
    model: str | None = None,
    depth: int | None = None,
    new: int = 64,
    repeats: int = 3,
) -> None:
    """Measure 3b: first token, decoding, a training step.

    Args:
        output: JSON lines, one for each row.
        seconds: Start no case after this time.
        groups: Numbers of the groups to measure, in this order.
        model: Measure this model in place of each group's, such as small.
        depth: Number of layers in each tower; by default all.
        new: Tokens to generate.
        repeats: Timed runs of each case.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
    from paligemma_jax.bench import clock, roofs

    deadline = time.perf_counter() + seconds
    machine = clock.describe_machine(clock.default_dtype())
    print("{device}, {cores} cores, {dtype}; jax {jax}\n".format_map(machine))
    print(_line(HEADER), _line(("---",) * len(HEADER)), sep="\n", flush=True)
    rows: list[Record] = []
    with Path(output).open("a") as file:
        for number in groups:
            group = replace(GROUPS[number], model=model or GROUPS[number].model)
            config = BenchConfig(
                new=new, repeats=repeats, depth=depth, against=group.against, remat="full"
            )
            for row in _measure(group, config, machine, deadline):
                rows.append({"model": group.model, "layers": group.layers} | machine | row)
                roofs.add_shares(rows)
                print(_line(_cells(rows[-1])), flush=True)
                print(json.dumps(rows[-1]), file=file, flush=True)
            gc.collect()


def _measure(
    group: Group, config: BenchConfig, machine: Record, deadline: float
) -> Iterator[Record]:
    """Yield the records of a group; of a case that fails, its error."""
    from paligemma_jax.bench import generation, training
    from paligemma_jax.bench.contender import transformers_model
    from paligemma_jax.checkpoints.synthetic import model_by_name, synthetic_inputs
    from paligemma_jax.model.stack import stack_model
    from paligemma_jax.sharding.devices import choose_attention

    model = torch_model = None
    attention = choose_attention(group.attention)
    for batch in group.batches:
        case: Record = {
            "quantize": group.quantize or "none",
            "attention": attention,
            "batch": batch,
        }
        if time.perf_counter() > deadline:
            yield case | {"error": "not measured, the time is over"}
            continue
        try:
            if group.train:
                trained = replace(config, model=(group.model,), train=group.train, batch=(batch,))
                for row in training.run(trained)["training"]:
                    yield case | row
                continue
            if model is None:
                model = model_by_name(
                    group.model, machine["dtype"], config.depth, group.quantize, attention
                )
                torch_model = transformers_model(model) if group.against else None
                model = stack_model(model) if group.layers == "stack" else model
            inputs = synthetic_inputs(model.config, batch, config.prompt[0])
            for row in generation.measure_case(model, torch_model, inputs, config):
                yield case | row
        except Exception as error:  # such as too little memory: the other cases go on
            yield case | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _cells(row: Record) -> tuple[str, ...]:
    case = tuple(str(row[name]) for name in CASE)
    if "error" in row:
        return (*case, row["error"])
    first = row["step_s" if "train" in row else "first_token_s"]["median"]
    compile_s = row.get("compile_s", 0)
    total = sum(compile_s.values()) if isinstance(compile_s, dict) else compile_s
    decoding = ("", "")
    if "bytes_s" in row:
        share = f"{row['bandwidth_share']:.0%} of {row['read_bytes_s'] / 1e9:,.0f}"
        decoding = (f"{row['decode_tokens_s']['median']:,.0f}", share)
    return (
        *case,
        f"{row['by']}, {row['train']}" if "train" in row else row["by"],
        f"{1e3 * first:,.1f}",
        f"{row['matrix_share']:.0%} of {row['matrix_flops_s'] / 1e12:.3g}",
        *decoding,
        f"{row['memory_bytes'] / 2**30:.1f}" if "memory_bytes" in row else "",
        f"{total:.0f}" if total else "",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(lambda: tyro.cli(run, prog="python -m tools.gpu_tables"))
