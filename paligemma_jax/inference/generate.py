"""Token ids in, token ids out: the host's part of generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from paligemma_jax.inference import beam
from paligemma_jax.inference.chosen import Chosen
from paligemma_jax.inference.decoding import decode, prefill
from paligemma_jax.inference.memory import check_logits_memory, check_memory
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.request import AnswerLengths, Generated, make_request
from paligemma_jax.inference.sampling import Beam, BestOf
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.model.stages import editing
from paligemma_jax.processing.processor import AnyArray, Inputs, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit

CHUNK = 16  # tokens per dispatch, where the host checks in between whether answers have ended


def generate(
    model: PaliGemma,
    inputs: Inputs,
    options: DecodingOptions = DecodingOptions(),
    *,
    seeds: Int[AnyArray, " B"] | None = None,
    slots: int = 0,
    features: Features | None = None,
    answer_lengths: AnswerLengths | None = None,
) -> Generated:
    """Generate the answer to every row, or the `num_return` best of Beam and BestOf.

    Args:
        inputs: Inputs without targets. Pads may be on either side.
        options: `stop` is ignored: that needs a tokenizer, see `answer_lengths`.
        seeds: Random seeds, one per prompt; by default 0, 1, 2, ...
        slots: Length of the cache; by default T + max_new_tokens, rounded up to a bucket. One
            program is compiled for each B, T and `slots`.
        features: Features of the images, if they are encoded already.
        answer_lengths: Ends answers where eos does not. Called every `CHUNK` tokens; not used by
            Beam.
    """
    if isinstance(options.sampler, Beam):
        slots = _check_slots(model, inputs, options, slots)
        request = make_request(model, len(inputs.tokens), options, seeds)
        edits = Edits.of(options.edit)
        features = encode_inputs(model, inputs, edits) if features is None else features
        limit = options.max_new_tokens
        return beam.search(model, inputs, features, request, limit, slots, options.sampler, edits)
    chunk = CHUNK if answer_lengths or options.logits else None
    chunks = decode_chunks(model, inputs, options, seeds, slots, features, answer_lengths, chunk)
    chosen = _join(model, chunks, options.max_new_tokens)
    if answer_lengths:  # drop the tokens that were decoded after the end
        keep = np.arange(chosen.tokens.shape[1]) < answer_lengths(chosen.tokens)[:, None]
        chosen = chosen.where(keep, model.config.pad_token_id)
    return rank_answers(chosen, options)


def rank_answers(chosen: Chosen, options: DecodingOptions) -> Generated:
    """The `num_return` most likely of the `copies` answers to each prompt, [B x copies, N]."""
    scores = chosen.log_probabilities.sum(axis=1)
    best = np.argsort(-scores.reshape(-1, options.copies), axis=1, kind="stable")
    best = best[:, : options.num_return] + np.arange(len(best))[:, None] * options.copies
    best = best.reshape(-1)
    chosen = jax.tree.map(lambda a: a[best], chosen)
    return Generated(
        chosen.tokens, chosen.log_probabilities, scores[best], chosen.top, chosen.logits
    )


def pad_answers(rows: Sequence[Chosen], pad: int) -> Chosen:
    """Answers [n] of several lengths as rows [B, N] of the longest."""
    longest = max(len(row.tokens) for row in rows)

    def extend(a: np.ndarray) -> np.ndarray:
        return np.pad(a, [(0, longest - len(a)), *[(0, 0)] * (a.ndim - 1)])

    padded = jax.tree.map(lambda *arrays: np.stack([extend(a) for a in arrays]), *rows)
    lengths = np.array([len(row.tokens) for row in rows])
    return padded.where(np.arange(longest) < lengths[:, None], pad)


def decode_chunks(
    model: PaliGemma,
    inputs: Inputs,
    options: DecodingOptions,
    seeds: Int[AnyArray, " B"] | None = None,
    slots: int = 0,
    features: Features | None = None,
    answer_lengths: AnswerLengths | None = None,
    chunk: int | None = None,
) -> Iterator[Chosen]:
    """Decode a batch piece by piece: the first token of every row, then `chunk` per dispatch.

    Arguments are those of `generate`, for any sampler but Beam. With BestOf, a prompt has as many
    rows as samples. By default one dispatch decodes all later tokens.
    """
    slots = _check_slots(model, inputs, options, slots)
    request = make_request(model, len(inputs.tokens), options, seeds)
    edits = Edits.of(options.edit)
    features = encode_inputs(model, inputs, edits) if features is None else features
    strategy, limit = options.sampler, options.max_new_tokens
    sampler = strategy.sampler if isinstance(strategy, BestOf) else strategy
    state = prefill(model, inputs, features, request, slots, sampler, options.copies, edits)
    chunk = chunk or slots - inputs.tokens.shape[1]
    first = jax.tree.map(to_host, state.chosen)
    so_far = first.tokens
    yield first
    while so_far.shape[1] < limit:
        count = so_far.shape[1]
        if answer_lengths:
            state = replace(state, done=state.done | (answer_lengths(so_far) <= count))
        if to_host(state.done).all():
            return
        new, state = decode(model, state, request, jnp.int32(limit), chunk, sampler, edits)
        new = jax.tree.map(lambda a, most=limit - count: to_host(a)[:, :most], new)
        so_far = np.concatenate([so_far, new.tokens], axis=1)
        yield new


def _check_slots(model: PaliGemma, inputs: Inputs, options: DecodingOptions, slots: int) -> int:
    tokens, new = inputs.tokens.shape[1], options.max_new_tokens
    if slots and tokens + new > slots:
        raise ValueError(f"slots must be at least {tokens} + {new} (prompt + answer), got {slots}")
    slots = slots or tokens + round_up(new)
    check_memory(model, len(inputs.tokens), options.copies, slots)
    if options.logits:
        check_logits_memory(model, len(inputs.tokens) * options.copies, new)
    return slots


def _join(model: PaliGemma, chunks: Iterator[Chosen], length: int) -> Chosen:
    """The chunks concatenated and padded to `length` tokens."""

    def concatenate(*parts: np.ndarray) -> np.ndarray:
        rows, rest = parts[0].shape[0], parts[0].shape[2:]
        missing = length - sum(part.shape[1] for part in parts)
        padding = np.zeros((rows, missing, *rest), parts[0].dtype)
        return np.concatenate([*parts, padding], axis=1)

    all_chunks = list(chunks)
    count = sum(chunk.tokens.shape[1] for chunk in all_chunks)
    joined = jax.tree.map(concatenate, *all_chunks)
    joined.tokens[:, count:] = model.config.pad_token_id
    return joined


def encode_inputs(model: PaliGemma, inputs: Inputs, edits: Edits = NO_EDITS) -> Features | None:
    """Encode the images of a batch, if there are any."""
    return None if inputs.images is None else encode_images(model, inputs.images, edits)


@mesh_jit
def encode_images(
    model: PaliGemma, images: Float[AnyArray, "*images S S 3"], edits: Edits = NO_EDITS
) -> Features:
    """Encode and project images."""
    with editing(edits):
        return model.encode_images(images)
