"""Groups of sampled answers, as rows to train on.

Axes: B prompts, G answers to each, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from paligemma_jax.inference.batching import pad_batch
from paligemma_jax.inference.generate import decode_chunks, encode_images
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import BestOf, Sample
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import AnyArray, EncodedPrompt, Inputs, Processor, round_up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """G sampled answers to each of B prompts; a pytree.

    The rows of a prompt follow each other. Its images are there once, not G times.
    """

    inputs: Inputs  # tokens [B G, T], the answers as targets; images [B, n, S, S, 3]
    log_probabilities: Float32[AnyArray, "BG N"]  # of the sampler; 0 after the end of an answer
    advantages: Float32[AnyArray, " BG"]
    reference: Float32[AnyArray, "BG N"] | None = None  # log-probabilities of the frozen reference


def sample_groups(
    model: PaliGemma,
    processor: Processor,
    prompts: Sequence[EncodedPrompt],
    images: Float[np.ndarray, "B n S S 3"],
    group: int,
    max_new_tokens: int,
    seeds: Int[np.ndarray, " B"],
) -> tuple[Groups, list[str]]:
    """Sample `group` answers to each prompt, at temperature 1, and encode them as targets.

    The log-probabilities are those of the whole vocabulary; only tokens of text are sampled.

    Returns:
        The groups, with advantages of 0, and their texts in the same order.
    """
    config = model.config
    ids = np.arange(config.decoder.vocab_size)
    is_text = (ids < processor.tokenizer.vocab_size) & (ids != config.image_token_id)
    options = DecodingOptions(max_new_tokens, BestOf(group, Sample()), allowed=is_text)
    inputs, features = pad_batch(processor, prompts), encode_images(model, images)
    chunks = list(decode_chunks(model, inputs, options, seeds, features=features))
    tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    values = np.concatenate([chunk.log_probabilities for chunk in chunks], axis=1)
    ends = np.isin(tokens, config.eos_token_ids)
    lengths = (np.cumsum(ends, axis=1) - ends == 0).sum(axis=1)  # with the end token
    answers = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    rows = [replace(prompts[i // group], suffix=answer) for i, answer in enumerate(answers)]
    padded = processor.pad(rows, "right", round_up(max(map(len, rows))))
    log_probabilities = np.zeros((len(rows), round_up(lengths.max())), np.float32)
    width = min(values.shape[1], log_probabilities.shape[1])
    log_probabilities[:, :width] = values[:, :width]
    groups = Groups(
        Inputs(images=images, **padded), log_probabilities, np.zeros(len(rows), np.float32)
    )
    return groups, [processor.decode(answer) for answer in answers]


def answer_log_probabilities(
    model: PaliGemma, groups: Groups
) -> tuple[Float32[Array, "BG N"], Bool[Array, "BG N"]]:
    """Compute the log-probability of every answer token in one teacher-forced pass.

    Returns:
        Log-probabilities, 0 after the end of an answer, and which places have a token.
    """
    inputs, N = groups.inputs, groups.log_probabilities.shape[1]
    assert inputs.images is not None
    features = model.encode_images(inputs.images)
    features = jnp.repeat(features, len(inputs.tokens) // len(features), axis=0)
    x = model.hidden(inputs.tokens, None, inputs.valid, inputs.prefix, features=features)
    places = jnp.argsort(~inputs.targets, axis=1, stable=True)[:, :N]
    x = jnp.take_along_axis(x, (places - 1)[..., None], axis=1, mode="clip")
    tokens = jnp.take_along_axis(inputs.tokens, places, axis=1)
    mask = jnp.take_along_axis(inputs.targets, places, axis=1)
    capped = model.config.profile.capped_prefill
    log_probabilities = model.decoder.log_probabilities(x, tokens, capped)
    return jnp.where(mask, log_probabilities, 0), mask
