"""Bytes that one decoding step moves: of a batch, and of the engine with rows of their own.

python -m tools.engine_bytes --model 3b-224
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.inference import decoding, slots
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.processing.processor import Inputs, round_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="3b-224")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="longest answer in tokens")
    options = parser.parse_args()
    model = abstract_model_by_name(options.model, "bfloat16")
    vision, B = model.config.vision, options.rows
    T = round_up(vision.num_patches + 16)
    S = T + round_up(options.new)
    ids, flags = shape(jnp.int32, B, T), shape(bool, B, T)
    inputs = Inputs(ids, None, valid=flags, prefix=flags, targets=flags)
    pixels = shape(jnp.float32, B, 1, vision.image_size, vision.image_size, 3)
    features = jax.eval_shape(lambda model, images: model.encode_images(images), model, pixels)
    request = jax.eval_shape(partial(make_request, model, B))
    prefill = partial(decoding.prefill.__wrapped__, slots=S, sampler=Greedy())
    batch = jax.eval_shape(prefill, model, inputs, features, request)
    limit = shape(jnp.int32)
    batch_step = decoding.decode.lower(model, batch, request, limit, S - T, Greedy())
    empty = partial(slots.empty_state.__wrapped__, rows=B, slots=S, top=0)
    rows = shape(jnp.int32, B)
    limits = dict.fromkeys(("seeds", "copies", "min_new_tokens", "max_new_tokens"), rows)
    running = jax.eval_shape(empty, model)
    row_request = replace(request, **limits)
    engine_step = slots.advance.lower(model, running, row_request, shape(bool, B), limit, 8)
    print("| program | GB per step | GFLOP per step |\n|---|---|---|")
    for name, lowered in (("batch", batch_step), ("engine", engine_step)):
        cost = lowered.compile().cost_analysis()  # a loop counts as one step
        print(f"| {name} | {cost['bytes accessed'] / 1e9:.2f} | {cost['flops'] / 1e9:.1f} |")


def shape(dtype: type, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


if __name__ == "__main__":
    main()
