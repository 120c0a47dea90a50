"""Answer encoded prompts: in batches, or one prompt as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jax import Array
from jaxtyping import Int

from paligemma_jax.inference.allowed import compile_allowed
from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.batching import pad_batch, run_batches
from paligemma_jax.inference.generate import decode_chunks, generate
from paligemma_jax.inference.memory import check_logits_memory
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import Beam, BestOf, is_integer
from paligemma_jax.inference.streaming import StreamedToken, stream_tokens
from paligemma_jax.interpretability.names import check_edits
from paligemma_jax.model.edits import Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor

STREAM = 8  # tokens per dispatch while streaming


def answer_batches(
    model: PaliGemma,
    processor: Processor,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Iterator[dict[int, Answer]]:
    """Answer prompts in batches. Yields the answers of each batch by prompt number."""
    options = _check_prompts(model, processor, prompts, options)
    checked_seeds = check_seeds(seeds, len(prompts))
    detokenizer = Detokenizer(processor.tokenizer, model.config.eos_token_ids, options.stops)

    def run(inputs: Inputs, features: Array | None, rows: np.ndarray) -> tuple[list[Answer]]:
        generated = generate(
            model,
            inputs,
            options.for_rows(rows),
            seeds=checked_seeds[rows],
            features=features,
            answer_lengths=detokenizer.lengths(),
        )
        return (detokenizer.answers(generated, options.sampler),)

    edits = Edits.of(options.edit)
    for batch in run_batches(model, processor, prompts, run, batch_size, progress, edits):
        yield {
            i: Answer("", [], [], 0.0, error=str(result))
            if isinstance(result, ValueError)
            else result[0]
            for i, result in batch.items()
        }


def stream_answer(
    model: PaliGemma,
    processor: Processor,
    prompt: EncodedPrompt,
    options: DecodingOptions,
    seed: int = 0,
) -> Iterator[list[StreamedToken]]:
    """Answer one prompt token by token, each as soon as no later token can change its text.

    Yields the tokens that a dispatch settles.
    """
    if isinstance(options.sampler, Beam | BestOf):
        raise ValueError(
            "sampler must not be Beam(...) or BestOf(...) for streaming, because text that was "
            f"streamed cannot change, got {options.sampler!r}"
        )
    options = _check_prompts(model, processor, [prompt], options)
    detokenizer = Detokenizer(processor.tokenizer, model.config.eos_token_ids, options.stops)
    inputs = replace(pad_batch(processor, [prompt]), images=processor.prompt_images([prompt]))
    chunks = decode_chunks(model, inputs, options, seeds=check_seeds([seed], 1), chunk=STREAM)
    yield from stream_tokens(detokenizer, chunks)


def check_seeds(seeds: Sequence[int] | None, prompts: int) -> Int[np.ndarray, " B"]:
    """Return the seeds of B prompts as an array; by default 0, 1, 2, ...

    Raises:
        ValueError: They are not B 32-bit integers.
    """
    if seeds is None:
        return np.arange(prompts)
    if np.ndim(seeds) != 1:
        raise ValueError(f"seeds must be a list with one integer per prompt, got {seeds!r}")
    if len(seeds) != prompts:
        raise ValueError(f"seeds must be one per prompt, got {len(seeds)} for {prompts} prompts")
    for seed in seeds:
        if not is_integer(seed) or not -(2**31) <= seed < 2**31:
            raise ValueError(f"seeds must be 32-bit integers, got {seed!r}")
    return np.asarray(seeds)


def answer_inputs(
    model: PaliGemma,
    processor: Processor,
    inputs: Inputs,
    options: DecodingOptions,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer rows that are inputs of the model already, in one batch.

    Raises:
        ValueError: A row has targets.
    """
    if np.any(inputs.targets):
        raise ValueError("Inputs to answer must have no targets: make them without suffixes")
    rows, tokens = inputs.tokens.shape
    options = _check_options(
        model, processor, rows, tokens, inputs.images is not None, options, by_row=True
    )
    detokenizer = Detokenizer(processor.tokenizer, model.config.eos_token_ids, options.stops)
    generated = generate(
        model, inputs, options, seeds=check_seeds(seeds, rows), answer_lengths=detokenizer.lengths()
    )
    return detokenizer.answers(generated, options.sampler)


def _check_prompts(
    model: PaliGemma, processor: Processor, prompts: list[EncodedPrompt], options: DecodingOptions
) -> DecodingOptions:
    has_images = any(prompt.images for prompt in prompts)
    tokens = processor.padded_length(prompts)
    return _check_options(model, processor, len(prompts), tokens, has_images, options)


def _check_options(
    model: PaliGemma,
    processor: Processor,
    rows: int,
    tokens: int,
    has_images: bool,
    options: DecodingOptions,
    by_row: bool = False,
) -> DecodingOptions:
    """Check the options against rows of so many tokens. Returns options that allow text only, and
    whose grammars are compiled."""
    check_edits(model, Edits.of(options.edit), has_images, by_row)
    most = processor.context - tokens
    if options.max_new_tokens > most:
        raise ValueError(
            f"max_new_tokens must be from 1 to {most} with a prompt of {tokens} tokens, "
            f"got {options.max_new_tokens}"
        )
    if options.logits:
        check_logits_memory(model, rows * options.num_return, options.max_new_tokens)
    allowed = compile_allowed(
        options.allowed, model.config, processor.tokenizer, rows, options.max_new_tokens
    )
    return replace(options, allowed=allowed)
