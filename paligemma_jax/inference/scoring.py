"""Teacher-forced passes: logits, every stage by name, log-probabilities of given answers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.inference.generate import encode_inputs
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import collect_stages
from paligemma_jax.processing.processor import Inputs, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit


@mesh_jit
def forward(model: PaliGemma, inputs: Inputs) -> Array:
    """Teacher-forced logits float32[B, T, V]."""
    return model(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)


@partial(mesh_jit, static_argnames="attention")
def forward_stages(model: PaliGemma, inputs: Inputs, attention: bool = False) -> dict[str, Array]:
    """Every stage's output of a teacher-forced pass, in order of computation."""
    with collect_stages(attention) as found:
        model(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)
    return found


def score(model: PaliGemma, inputs: Inputs, features: Array | None = None) -> np.ndarray:
    """float32[B]: the log-probability of each row's targets (suffix and eos), in the profile's teacher-forced logits.

    features: of the images, if they are encoded already. One program is compiled for every B, T and 32 targets.
    """
    longest = min(round_up(int(inputs.targets.sum(axis=1).max())), inputs.targets.shape[1])
    return to_host(_score(model, inputs, encode_inputs(model, inputs) if features is None else features, longest))


@partial(mesh_jit, static_argnames="longest")
def _score(model: PaliGemma, inputs: Inputs, features: Array | None, longest: int) -> Array:
    x = model.hidden(inputs.tokens, None, inputs.valid, inputs.prefix, features=features)
    places = jnp.argsort(~inputs.targets, axis=1, stable=True)[:, :longest]
    x = jnp.take_along_axis(x, (places - 1)[..., None], axis=1)
    tokens, wanted = (jnp.take_along_axis(jnp.asarray(a), places, axis=1) for a in (inputs.tokens, inputs.targets))
    return jnp.where(wanted, model.decoder.log_probabilities(x, tokens, model.config.profile.capped_prefill), 0).sum(axis=1)


def alternatives(model: PaliGemma, inputs: Inputs, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the N targets of one row: float32[N] log-probabilities as in `score`, and the likeliest tokens in the place of each, likeliest first,

    int32[N, count] with float32[N, count]. One program is compiled for every 32 targets.
    """
    targets = int(inputs.targets.sum())
    found = _alternatives(model, inputs, min(round_up(targets), inputs.targets.shape[1]), count)
    own, tokens, others = (to_host(one)[:targets] for one in found)
    return own, tokens, others


@partial(mesh_jit, static_argnames=("longest", "count"))
def _alternatives(model: PaliGemma, inputs: Inputs, longest: int, count: int) -> tuple[Array, Array, Array]:
    x = model.hidden(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)[0]
    places = jnp.argsort(~inputs.targets[0], stable=True)[:longest]
    logits = jax.nn.log_softmax(model.decoder.logits(x[places - 1], model.config.profile.capped_prefill))
    own = jnp.take_along_axis(logits, inputs.tokens[0, places][:, None], axis=1)[:, 0]
    others, tokens = jax.lax.top_k(logits, count)
    return own, tokens, others


def _images(inputs: Inputs) -> Array | None:
    return jnp.asarray(inputs.images) if len(inputs.images) else None
