"""Teacher-forced passes: logits, intermediate stages, and log-probabilities of given answers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from paligemma_jax.inference.batching import run_batches
from paligemma_jax.inference.generate import encode_inputs
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.layers import FullFloat, full_dtype
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.model.prefix import soft_token_count
from paligemma_jax.model.stages import Fed, collect_stages, editing
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit


@mesh_jit
def forward(model: PaliGemma, inputs: Inputs, edits: Edits = NO_EDITS) -> FullFloat[Array, "B T V"]:
    """Compute teacher-forced logits; those at t predict the token at t + 1."""
    with editing(edits):
        return model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)


@partial(mesh_jit, static_argnames=("attention", "branches", "only"))
def forward_stages(
    model: PaliGemma,
    inputs: Inputs,
    attention: bool = False,
    branches: bool = False,
    fed: Fed | None = None,
    only: tuple[str, ...] | None = None,
    edits: Edits = NO_EDITS,
) -> dict[str, Float[Array, "..."]]:
    """Compute every stage of a teacher-forced pass, in order of computation.

    Other arguments are those of `collect_stages`.
    """
    with collect_stages(attention, branches, fed or {}, only, edits) as stages:
        model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    return stages


def score(
    model: PaliGemma, inputs: Inputs, features: Features | None = None, edits: Edits = NO_EDITS
) -> FullFloat[np.ndarray, " B"]:
    """Compute the log-probability of each row's targets (suffix and eos).

    One program is compiled for each B, T and bucket of 32 targets.

    Args:
        features: Features of the images, if they are encoded already.
    """
    features = encode_inputs(model, inputs, edits) if features is None else features
    return to_host(_score(model, inputs, features, _max_targets(inputs), edits))


def score_prompts(
    model: PaliGemma,
    processor: Processor,
    prompts: list[EncodedPrompt],
    batch_size: int,
    progress: bool | None,
    edits: Edits = NO_EDITS,
) -> FullFloat[np.ndarray, " N"]:
    """Compute the `score` of any number of encoded prompts with suffixes, in batches.

    Raises:
        ValueError: A prompt does not fit the context, or its image cannot be read.
    """
    processor.padded_length(prompts)

    def run(inputs: Inputs, features: Array | None, _: np.ndarray) -> tuple[np.ndarray]:
        return (score(model, inputs, features, edits)[:, None],)

    batches = run_batches(model, processor, prompts, run, batch_size, progress, edits)
    results = {i: result for batch in batches for i, result in batch.items()}
    scores = np.zeros(len(prompts), full_dtype(model.config.activation_dtype))
    for i, result in sorted(results.items()):
        if isinstance(result, ValueError):
            raise result
        scores[i] = result[0].item()
    return scores


@partial(mesh_jit, static_argnames="max_targets")
def _score(
    model: PaliGemma,
    inputs: Inputs,
    features: Features | None,
    max_targets: int,
    edits: Edits = NO_EDITS,
) -> FullFloat[Array, " B"]:
    with editing(edits):
        x = model.hidden(inputs.tokens, None, inputs.valid, inputs.prefix, features=features)
    places = jnp.argsort(~inputs.targets, axis=1, stable=True)[:, :max_targets]
    x = jnp.take_along_axis(x, (places - 1)[..., None], axis=1)
    tokens = jnp.take_along_axis(jnp.asarray(inputs.tokens), places, axis=1)
    is_target = jnp.take_along_axis(jnp.asarray(inputs.targets), places, axis=1)
    capped = model.config.profile.capped_prefill
    log_probabilities = model.decoder.log_probabilities(x, tokens, capped)
    return jnp.where(is_target, log_probabilities, 0).sum(axis=1)


def alternatives(
    model: PaliGemma, inputs: Inputs, count: int
) -> tuple[
    FullFloat[np.ndarray, " N"], Int32[np.ndarray, "N count"], FullFloat[np.ndarray, "N count"]
]:
    """Compare the N targets of one row with the most likely tokens in their place.

    One program is compiled for each bucket of 32 targets.

    Returns:
        The log-probability of each target, as in `score`; the `count` most likely tokens in its
        place, most likely first; and their log-probabilities.
    """
    targets = int(inputs.targets.sum())
    results = _alternatives(model, inputs, _max_targets(inputs), count)
    log_probabilities, tokens, others = (to_host(array)[:targets] for array in results)
    return log_probabilities, tokens, others


@partial(mesh_jit, static_argnames=("max_targets", "count"))
def _alternatives(
    model: PaliGemma, inputs: Inputs, max_targets: int, count: int
) -> tuple[Array, Array, Array]:
    x = model.hidden(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)[0]
    places = jnp.argsort(~inputs.targets[0], stable=True)[:max_targets]
    logits = model.decoder.logits(x[places - 1], model.config.profile.capped_prefill)
    log_probabilities = jax.nn.log_softmax(logits)
    targets = inputs.tokens[0, places][:, None]
    own = jnp.take_along_axis(log_probabilities, targets, axis=1)[:, 0]
    others, tokens = jax.lax.top_k(log_probabilities, count)
    return own, tokens, others


def check_inputs(model: PaliGemma, inputs: Inputs) -> None:
    """Check for errors that a compiled program would silently clip.

    Raises:
        ValueError: A token is outside the vocabulary, or image tokens do not match the images.
    """
    config = model.config
    tokens, size = np.asarray(inputs.tokens), config.decoder.vocab_size
    known = [config.image_token_id, *config.soft_tokens(soft_token_count(model))]
    invalid = tokens[~np.isin(tokens, known) & ((tokens < 0) | (tokens >= size))]
    if invalid.size:
        raise ValueError(f"token {invalid[0]} is outside the vocabulary of {size}")
    if inputs.images is None:
        return
    count, patches = len(inputs.images), config.vision.num_patches
    found = np.sum(tokens == config.image_token_id)
    if found != count * patches:
        raise ValueError(
            f"{count} images need {count * patches} image tokens ({patches} each), got {found}"
        )


def _max_targets(inputs: Inputs) -> int:
    """The largest number of targets in a row, rounded up to a bucket."""
    return min(round_up(int(inputs.targets.sum(axis=1).max())), inputs.targets.shape[1])
