"""The measuring instrument: prefill and decoding against what the machine can do, and against transformers.

The table of the published sizes on an accelerator, one process a model so that each has the memory to itself:

    for model in 3b-224 10b-224 28b-224; do
        paligemma-jax bench --model $model --dtype bfloat16 --batch 1 8 --layers list stack --against transformers transformers-compile \
            --cached 300 4400 --json > $model.json
    done
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from paligemma_jax.checkpoints.load import DTYPES
from paligemma_jax.checkpoints.synthetic import model_by_name, synthetic_inputs
from paligemma_jax.inference import generate
from paligemma_jax.inference.generate import DecodeState
from paligemma_jax.inference.request import Request, make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.flops import decode_bytes, prefill_flops
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.stack import stack_model
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.devices import best_time, matrix_rate

Clocked = Callable[[], tuple[float, float]]  # runs once: seconds to the first token, and from there to the last


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every combination of model, layers, batch and prompt."""

    model: tuple[str, ...] = ("tiny",)
    batch: tuple[int, ...] = (1,)
    prompt: tuple[int, ...] = (32,)  # text tokens after those of the image
    new: int = 64
    layers: tuple[str, ...] = ("list",)
    cached: tuple[int, ...] = ()
    against: tuple[str, ...] = ()
    dtype: str | None = None
    quantize: tuple[str, ...] = ()  # each in turn; "none" is not at all
    depth: int | None = None
    repeats: int = 5
    train: tuple[str, ...] = ()
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        if self.quantize and (self.against or self.train):
            raise ValueError("bench --quantize measures answering alone: leave out --against and --train (qlora trains on nf4)")
        for how in self.quantize:
            Quantization.parse(how)
        if min(*self.batch, *self.prompt, *self.cached, self.depth or 1, self.repeats + bool(self.train)) < 1 or self.new < 2:
            raise ValueError("bench counts from 1: --batch, --prompt, --cached, --depth and --repeats are at least 1, --new at least 2")


def run(plan: BenchConfig) -> dict[str, Any]:
    """Measures; returns {"machine": ..., "rows": [...], "cached": [...]}, all of it plain numbers, times in seconds."""
    dtype = plan.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    report: dict[str, Any] = {"machine": measure_machine(dtype), "rows": [], "cached": []}
    steps = len(plan.model) * max(1, len(plan.quantize)) * len(plan.layers) * len(plan.batch) * (len(plan.prompt) + len(plan.cached))
    with tqdm(total=steps, disable=None, unit="case") as bar:
        for name, how in product(plan.model, plan.quantize or (None,)):
            for key, row in _measure_model(name, dtype, plan, how):
                report[key].append(row)
                bar.update(row["by"] == "paligemma-jax")
            gc.collect()
    machine, again = report["machine"], measure_machine(dtype)  # twice, for others may have been busy the first time
    machine |= {name: max(machine[name], again[name]) for name in ("copy_bytes_s", "matrix_flops_s")}
    machine["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for row in report["rows"] + report["cached"]:
        row["bandwidth_share"] = row["bytes_s"] / machine["copy_bytes_s"]
    for row in report["rows"]:
        row["matrix_share"] = row["flops_s"] / machine["matrix_flops_s"]
    return report


def _measure_model(name: str, dtype: str, plan: BenchConfig, how: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    start = time.perf_counter()
    model = jax.block_until_ready(model_by_name(name, dtype, plan.depth, how))
    load_s, theirs = time.perf_counter() - start, None
    if plan.against:
        from paligemma_jax.bench.contender import transformers_model

        theirs = transformers_model(model)
    for form in sorted(set(plan.layers)):  # the list first: stacking uses it up
        model = stack_model(model) if form == "stack" else model
        about = {"model": f"{name} {how}" if how else name, "layers": form, "dtype": dtype, "load_s": load_s}
        for batch in plan.batch:
            for prompt in plan.prompt:
                for row in _measure(model, theirs, synthetic_inputs(model.config, batch, prompt), plan):
                    yield "rows", about | row
            for row in _measure_cached(model, batch, plan):
                yield "cached", about | row


def _measure(model: PaliGemma, theirs: Any, inputs: Inputs, plan: BenchConfig) -> Iterator[dict[str, Any]]:
    """One row for this model and one for each that it is measured against, run in turn."""
    ours, compile_s, memory = compile_programs(model, inputs, plan.new)
    contenders: dict[str, Clocked] = {"paligemma-jax": ours}
    for name in plan.against:
        from paligemma_jax.bench.contender import generator

        contenders[name] = generator(theirs, inputs, plan.new, compiled=name.endswith("compile"))
    times = alternate(contenders, plan.repeats)
    (rows, tokens), config = inputs.tokens.shape, model.config
    traffic = (plan.new - 1) * step_bytes(model, tokens + plan.new // 2, rows)
    for name, (first, rest) in times.items():
        row = {"by": name, "batch": rows, "prompt_tokens": tokens, "new_tokens": plan.new, "first_token_s": spread(first)}
        row["prefill_tokens_s"], row["flops_s"] = spread(rows * tokens / first), rows * prefill_flops(config, tokens) / median(first)
        row["decode_tokens_s"], row["bytes_s"] = spread(rows * (plan.new - 1) / rest), traffic / median(rest)
        if name == "paligemma-jax":
            row |= {"compile_s": compile_s, "memory_bytes": memory}
        else:  # how many times faster this model is: of each repeat, so that a noisy neighbour hurts both alike
            row["slower"] = {"prefill": median(first / times["paligemma-jax"][0]), "decode": median(rest / times["paligemma-jax"][1])}
        yield row


def compile_programs(model: PaliGemma, inputs: Inputs, new: int) -> tuple[Clocked, dict[str, float], int]:
    """The three programs of generation, run one after the other; what compiling each took; the memory of the largest in bytes."""
    rows, tokens = inputs.tokens.shape
    request, limit, seconds = make_request(model, rows, min_new_tokens=new), jnp.int32(new), {}
    programs: dict[str, Any] = {}

    def build(name: str, function: Any, *args: Any, **static: Any) -> Any:
        start = time.perf_counter()
        programs[name] = function.lower(*args, **static).compile()
        seconds[name] = time.perf_counter() - start
        return jax.eval_shape(partial(function, **static), *args)

    features = build("encode", generate.encode_images, model, inputs.images)
    state = build("prefill", generate.prefill, model, inputs, features, request, slots=tokens + new, sampler=Greedy())
    build("decode", generate.decode, model, state, request, limit, size=new - 1, sampler=Greedy())

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        state = programs["prefill"](model, inputs, programs["encode"](model, inputs.images), request)
        np.asarray(state.token)
        first = time.perf_counter()
        _, _, state = programs["decode"](model, state, request, limit)
        assert state.step == new
        return first - start, time.perf_counter() - first

    return once, seconds, max(memory_bytes(program) for program in programs.values())


def memory_bytes(program: Any) -> int:
    """The peak of the device so far, where it counts that; else the arguments, results and temporaries of a compiled program."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return program_bytes(program)["memory_bytes"]


def program_bytes(program: Any) -> dict[str, int]:
    """By the compiler's analysis: arguments, temporaries, and all with the results that do not take an argument's place."""
    sizes = program.memory_analysis()
    found = {"argument_bytes": sizes.argument_size_in_bytes, "temporary_bytes": sizes.temp_size_in_bytes}
    return found | {"memory_bytes": sum(found.values()) + sizes.output_size_in_bytes - sizes.alias_size_in_bytes}


def _measure_cached(model: PaliGemma, rows: int, plan: BenchConfig) -> Iterator[dict[str, Any]]:
    """Decoding with so many tokens in the cache; the cache is made up, since prefilling thousands of tokens would take longer than all else."""
    request, limit = make_request(model, rows, min_new_tokens=plan.new), jnp.int32(plan.new)
    contenders = {str(cached): _cached(model, rows, cached, plan.new, request, limit) for cached in plan.cached}
    times = alternate(contenders, plan.repeats)
    for cached, (_, rest) in zip(plan.cached, times.values()):
        traffic = step_bytes(model, cached + plan.new // 2, rows)
        row = {"by": "paligemma-jax", "batch": rows, "cached_tokens": cached, "step_s": spread(rest / (plan.new - 1)), "step_bytes": traffic}
        yield row | {"bytes_s": traffic * (plan.new - 1) / median(rest)}


def step_bytes(model: PaliGemma, cached: int, rows: int) -> int:
    """`decode_bytes` of a model as it is held, quantized or not."""
    config = model.config
    numbers = decode_bytes(config, cached, rows, 1) - decode_bytes(config, 0, rows, 1)
    each = 1 + 4 / config.decoder.head_dim if config.cache else jnp.dtype(config.dtype).itemsize
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.decoder)) + round(each * numbers)


def _cached(model: PaliGemma, rows: int, cached: int, new: int, request: Request, limit: Array) -> Clocked:
    yes = jax.ShapeDtypeStruct((rows, cached), jnp.bool_)
    inputs = Inputs(jax.ShapeDtypeStruct(yes.shape, jnp.int32), (), yes, yes, yes)
    state = jax.eval_shape(partial(generate.prefill, slots=cached + new, sampler=Greedy()), model, inputs, None, request)
    program = generate.decode.lower(model, state, request, limit, size=new - 1, sampler=Greedy()).compile()

    def once() -> tuple[float, float]:
        begin = jax.block_until_ready(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state))
        begin = jax.block_until_ready(_filled(begin, cached))
        start = time.perf_counter()
        jax.block_until_ready(program(model, begin, request, limit))
        return 0.0, time.perf_counter() - start

    return once


def _filled(state: DecodeState, cached: int) -> DecodeState:
    """`state` as after a prefill of `cached` tokens."""
    slots = jnp.broadcast_to(jnp.arange(state.cache.span.valid.shape[1]), state.cache.span.valid.shape)
    span = replace(state.cache.span, positions=slots + 1, prefix=slots < cached, valid=slots < cached)
    return replace(state, step=jnp.int32(1), cache=replace(state.cache, span=span, length=jnp.int32(cached)))


def alternate(contenders: dict[str, Clocked], repeats: int) -> dict[str, np.ndarray]:
    """Every contender once to warm up, then all in turn: name -> seconds [2, repeats]."""
    for once in contenders.values():
        once()
    times = [[once() for once in contenders.values()] for _ in range(repeats)]
    return {name: np.array([turn[i] for turn in times]).T for i, name in enumerate(contenders)}


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def measure_machine(dtype: str) -> dict[str, Any]:
    """Bytes per second of a big copy (read and written ones), and FLOP per second of a big square product, best of a few."""
    device = jax.local_devices()[0]
    cpu = device.platform == "cpu"
    copied = jnp.ones(2**26 if cpu else 2**29, jnp.float32)
    copy_s = best_time(jax.jit(lambda x: x + 1), copied)
    about = {"device": device.device_kind, "platform": device.platform, "cores": os.cpu_count(), "dtype": dtype, "jax": jax.__version__}
    return about | {"copy_bytes_s": 2 * copied.nbytes / copy_s, "matrix_flops_s": matrix_rate(dtype, 2048 if cpu else 8192)}
