"""Measure prefill and decoding against the limits of the machine, and against transformers.

For the published sizes on an accelerator, run one process per model, so that each has the memory to
itself:

    for model in 3b-224 10b-224 28b-224; do
        paligemma-jax bench --model $model --dtype bfloat16 --batch 1 8 --layers list stack \
            --attention fused plain --against transformers transformers-compile \
            --cached 300 4400 --json > $model.json
    done
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.bench import clock
from paligemma_jax.bench.cached import fixed_length_request, measure_cached, step_bytes
from paligemma_jax.bench.clock import OURS, Record, Run, alternate, spread
from paligemma_jax.bench.config import BenchConfig
from paligemma_jax.bench.roofs import ROOFS, add_shares, product_dtype, roofs
from paligemma_jax.checkpoints.synthetic import model_by_name, synthetic_inputs
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.inference import generate
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.flops import prefill_flops
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.compiled import mesh_jit
from paligemma_jax.sharding.devices import choose_attention, peak_resident_bytes, program_bytes

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration


def run(config: BenchConfig) -> Record:
    """Measure generation.

    Returns:
        {"machine": ..., "rows": [...], "cached": [...]}, with times in seconds.
    """
    machine = clock.describe_machine(config.dtype or clock.default_dtype())
    report: Record = {"machine": machine, "rows": [], "cached": []}
    forms = [choose_attention(form) for form in config.attention or (None,)]
    models = list(product(config.model, config.quantize or (None,), forms))
    cases = len(config.layers) * len(config.batch) * (len(config.prompt) + len(config.cached))
    with progress_bar(desc="bench", total=len(models) * cases, unit="case") as bar:
        for model in models:
            for key, row in _measure_model(*model, machine, config):
                report[key].append(row)
                bar.update(row["by"] == OURS)
            gc.collect()
    machine["peak_resident_bytes"] = peak_resident_bytes()
    add_shares(report["rows"] + report["cached"])
    return report


def _measure_model(
    name: str, quantization: str | None, form: str, machine: Record, config: BenchConfig
) -> Iterator[tuple[str, Record]]:
    start, dtype = time.perf_counter(), machine["dtype"]
    model = jax.block_until_ready(model_by_name(name, dtype, config.depth, quantization, form))
    load_seconds = time.perf_counter() - start
    torch_model = None
    if config.against:
        from paligemma_jax.bench.contender import transformers_model

        torch_model = transformers_model(model)
    for layers in sorted(set(config.layers)):  # the list first: stacking consumes it
        model = stack_model(model) if layers == "stack" else model
        common = {
            "model": name,
            "quantize": quantization or "none",
            "layers": layers,
            "attention": form,
            "device": machine["device"],
            "dtype": dtype,
            "load_s": load_seconds,
        }
        for batch in config.batch:
            for prompt in config.prompt:
                inputs = synthetic_inputs(model.config, batch, prompt)
                for row in measure_case(model, torch_model, inputs, config):
                    yield "rows", common | row
            for row in measure_cached(model, batch, config):
                yield "cached", common | row


def measure_case(
    model: PaliGemma,
    torch_model: PaliGemmaForConditionalGeneration | None,
    inputs: Inputs,
    config: BenchConfig,
) -> Iterator[Record]:
    """Yield one record for this model and one for each contender, which run in turn. They have the
    rates of the roofs, but not yet the shares (`add_shares`).

    Args:
        torch_model: The model to compare with, if `config.against` names contenders.
        config: Also says how many tokens to generate, and how often.
    """
    run, compiled = compile_programs(model, inputs, config.new)
    (rows, tokens), steps = inputs.tokens.shape, config.new - 1
    flops = rows * prefill_flops(model.config, tokens)
    nbytes = step_bytes(model, tokens + config.new // 2, rows)
    products = product_dtype(model)
    contenders = {OURS: run, ROOFS: roofs(products, nbytes)}
    if torch_model is not None:
        from paligemma_jax.bench.contender import GENERATORS

        for name in config.against:
            contenders[name] = GENERATORS[name](torch_model, inputs, config.new)
    times = alternate(contenders, config.repeats)
    flop_seconds, byte_seconds = times.pop(ROOFS)
    for name, (prefill, decode) in times.items():
        row = {
            "by": name,
            "batch": rows,
            "prompt_tokens": tokens,
            "new_tokens": config.new,
            "first_token_s": spread(prefill),
            "prefill_tokens_s": spread(rows * tokens / prefill),
            "flops_s": flops / median(prefill),
            "matrix_dtype": products,
            "matrix_flops_s": 1 / flop_seconds.min(),
            "decode_tokens_s": spread(rows * steps / decode),
            "step_bytes": nbytes,
            "bytes_s": steps * nbytes / median(decode),
            "read_bytes_s": 1 / byte_seconds.min(),
        }
        if name == OURS:
            yield row | compiled
            continue
        # Ratios are taken per repeat, so that a disturbance affects both alike.
        our_prefill, our_decode = times[OURS]
        ratios = {"prefill": median(prefill / our_prefill), "decode": median(decode / our_decode)}
        yield row | {"slower": ratios}


def compile_programs(model: PaliGemma, inputs: Inputs, new: int) -> tuple[Run, Record]:
    """Compile the three programs of generation.

    Returns:
        A function that runs them, and {"compile_s": seconds by program, "memory_bytes": ...}.
    """
    rows, tokens = inputs.tokens.shape
    request, limit = fixed_length_request(model, rows, new), jnp.int32(new)
    seconds: dict[str, float] = {}

    def build(name: str, function: mesh_jit, *args: object, **static: object):
        start = time.perf_counter()
        program = function.lower(*args, **static).compile()
        seconds[name] = time.perf_counter() - start
        return program, jax.eval_shape(partial(function, **static), *args)

    encode, features = build("encode", generate.encode_images, model, inputs.images)
    args = model, inputs, features, request
    prefill, state = build("prefill", generate.prefill, *args, slots=tokens + new, sampler=Greedy())
    args = model, state, request, limit
    decode, _ = build("decode", generate.decode, *args, size=new - 1, sampler=Greedy())

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        state = prefill(model, inputs, encode(model, inputs.images), request)
        np.asarray(state.token)
        first = time.perf_counter()
        _, state = decode(model, state, request, limit)
        assert state.step == new
        return first - start, time.perf_counter() - first

    memory = max(program_bytes(program)["memory_bytes"] for program in (encode, prefill, decode))
    return run, {"compile_s": seconds, "memory_bytes": memory}
