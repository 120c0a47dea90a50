"""Measure decoding with many tokens in the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
from jax import Array

from paligemma_jax.bench.clock import OURS, Record, Run, alternate, spread
from paligemma_jax.bench.config import BenchConfig
from paligemma_jax.bench.roofs import ROOFS, roofs
from paligemma_jax.inference import generate
from paligemma_jax.inference.decoding import DecodeState
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.request import Request, make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.flops import decode_bytes
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs


def fixed_length_request(model: PaliGemma, rows: int, new: int) -> Request:
    """Return a request that generates exactly `new` tokens in every row."""
    return make_request(model, rows, DecodingOptions(new, min_new_tokens=new))


def step_bytes(model: PaliGemma, cached: int, rows: int) -> int:
    """Return the bytes read to decode one token per row (`decode_bytes`), with weights and cache in
    their stored format."""
    config = model.config
    numbers = decode_bytes(config, cached, rows, 1) - decode_bytes(config, 0, rows, 1)
    itemsize = jnp.dtype(config.dtype).itemsize
    if config.cache:  # int8, with a float32 scale per head
        itemsize = 1 + 4 / config.decoder.head_dim
    decoder = model.decoder
    weights = jax.tree.leaves((decoder.layers, decoder.norm, decoder.output))
    return sum(leaf.nbytes for leaf in weights) + round(itemsize * numbers)


def measure_cached(model: PaliGemma, rows: int, config: BenchConfig) -> Iterator[Record]:
    """Yield the time of a decoding step for each number of cached tokens."""
    request, limit = fixed_length_request(model, rows, config.new), jnp.int32(config.new)
    traffic = {
        cached: step_bytes(model, cached + config.new // 2, rows) for cached in config.cached
    }
    contenders: dict[str, Run] = {}
    for cached, nbytes in traffic.items():
        contenders[f"{cached}"] = _decoder(model, rows, cached, config.new, request, limit)
        contenders[f"{cached} {ROOFS}"] = roofs(nbytes=nbytes)
    steps, times = config.new - 1, alternate(contenders, config.repeats)
    for cached, nbytes in traffic.items():
        seconds = times[f"{cached}"][1]
        yield {
            "by": OURS,
            "batch": rows,
            "cached_tokens": cached,
            "step_s": spread(seconds / steps),
            "step_bytes": nbytes,
            "bytes_s": nbytes * steps / median(seconds),
            "read_bytes_s": 1 / times[f"{cached} {ROOFS}"][1].min(),
        }


def _decoder(
    model: PaliGemma, rows: int, cached: int, new: int, request: Request, limit: Array
) -> Run:
    """Return a function that decodes from a zero-filled cache of `cached` tokens. Prefilling
    thousands of tokens would take longer than everything else."""

    def prefill() -> DecodeState:
        mask = jnp.ones((rows, cached), bool)
        inputs = Inputs(jnp.int32(mask), None, valid=mask, prefix=mask, targets=mask)
        slots = cached + new
        return generate.prefill(model, inputs, None, request, slots=slots, sampler=Greedy())

    shapes = jax.eval_shape(prefill)
    decode = generate.decode.lower(model, shapes, request, limit, size=new - 1, sampler=Greedy())
    program = decode.compile()

    def run() -> tuple[float, float]:
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        state = jax.block_until_ready(_after_prefill(state, cached))
        start = time.perf_counter()
        jax.block_until_ready(program(model, state, request, limit))
        return 0.0, time.perf_counter() - start

    return run


def _after_prefill(state: DecodeState, cached: int) -> DecodeState:
    """Mark the first `cached` slots as filled by a prefill."""
    valid = state.cache.span.valid
    slots = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
    used = slots < cached
    # The state is donated, so no array may occur in it twice.
    span = replace(state.cache.span, positions=slots + 1, prefix=used, valid=jnp.copy(used))
    cache = replace(state.cache, span=span, length=jnp.int32(cached))
    return replace(state, step=jnp.int32(1), cache=cache)
