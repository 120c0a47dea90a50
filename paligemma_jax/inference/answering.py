"""Answer encoded prompts: in batches, or one prompt as a stream of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.inference.allowed import check_prompts, compile_allowed
from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.batching import check_batch_size, pad_batch, run_batches
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.generate import decode_chunks, generate
from paligemma_jax.inference.jobs import sampler_of
from paligemma_jax.inference.memory import check_logits_memory
from paligemma_jax.inference.options import DecodingOptions, check_seeds
from paligemma_jax.inference.sampling import Beam, BestOf
from paligemma_jax.inference.streaming import StreamedToken, stream_tokens
from paligemma_jax.interpretability.names import check_edits
from paligemma_jax.model.edits import Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.sharding.mesh import mesh_of, padded_batch_size

STREAM = 8  # tokens per dispatch while streaming
MANY = 4  # batches from which an engine saves more time than compiling its programs takes


def answer_batches(
    model: PaliGemma,
    processor: Processor,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Iterator[dict[int, Answer]]:
    """Answer prompts, many of them by an `Engine` if it has the options, else in batches. Yields
    new answers by prompt number."""
    checked_seeds = check_seeds(seeds, len(prompts))
    check_batch_size(model, "batch_size", batch_size)
    # An engine that several processes share was not tried.
    is_local = mesh_of(model) is None or jax.process_count() == 1
    if is_local and len(prompts) >= MANY * batch_size and sampler_of(options):
        # The engine compiles the grammar of each prompt, which all together may be too large.
        _check_prompts(model, processor, prompts, replace(options, allowed=None))
        check_prompts(options.allowed, len(prompts))
        yield from _answer_many(
            model, processor, prompts, options, checked_seeds, batch_size, progress
        )
        return
    options = _check_prompts(model, processor, prompts, options)
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


def _answer_many(
    model: PaliGemma,
    processor: Processor,
    prompts: Sequence[EncodedPrompt],
    options: DecodingOptions,
    seeds: Int[np.ndarray, " B"],
    rows: int,
    progress: bool | None = None,
) -> Iterator[dict[int, Answer]]:
    """Answer prompts by an engine, the longest first. Yields new answers by prompt number.

    Args:
        rows: Number of rows; more on a mesh or for the samples of one prompt.
        progress: Whether to report progress; by default on a terminal.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    slots = round_up(len(prompts[order[0]])) + options.max_new_tokens
    rows = padded_batch_size(max(rows, options.copies), mesh_of(model))
    show = sys.stderr.isatty() if progress is None else progress
    top = options.top_log_probabilities
    with (
        Engine(model, processor, rows, slots, top) as engine,
        progress_bar(total=len(prompts), unit="prompt", show=show) as bar,
    ):
        numbers = {
            engine.submit(prompts[i], options.for_rows(np.array([i])), int(seeds[i])): i
            for i in order
        }
        for answers in engine.answers():
            bar.update(len(answers))
            yield {numbers[number]: answer for number, answer in answers.items()}


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
