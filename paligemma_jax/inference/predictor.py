"""What `load` returns: processor, model and generation in one object."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.inference import generate, pointing, scoring
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.batching import run_batches
from paligemma_jax.inference.request import Ends, make_request
from paligemma_jax.inference.sampling import Beam, Greedy, Sample, Sampler, Strategy, is_integer
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.image import ImageSource, pixel_values
from paligemma_jax.processing.locations import Detections
from paligemma_jax.processing.mask_codec import NO_CODEC, MaskCodec, load_codec
from paligemma_jax.processing.processor import (
    EncodedPrompt,
    ImageInputs,
    Inputs,
    Processor,
    round_up,
)

STREAM = 8  # tokens a dispatch while streaming

Texts = str | Sequence[str]




@dataclass(frozen=True)
class Predictor:
    """A loaded PaliGemma. `images`, `prompts` and `suffixes` are those of `Processor`."""

    model: PaliGemma
    processor: Processor
    codec_file: Path | None = None  # of the masks

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        return f"Predictor({count:,} numbers, {self.config.vision.image_size} pixels, {self.config.dtype})"

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @cached_property
    def codec(self) -> MaskCodec:
        """What turns the `<seg>` of an answer into a mask and back. ValueError if none lies beside the checkpoint."""
        if self.codec_file is None:
            raise ValueError(NO_CODEC)
        return load_codec(self.codec_file)

    def generate(self, images: ImageInputs, prompts: Texts, max_new_tokens: int = 128, sampler: Strategy = Greedy(), **options: Any) -> list[str]:
        """The answer to every prompt, as text without special tokens. Arguments, options and errors are those of `answers`;

        the first row that fails raises its error, after all others are done. `answers(...)` tells which rows failed and keeps the rest.
        """
        found = self.answers(images, prompts, max_new_tokens, sampler, **options)
        if wrong := [(i, answer.error) for i, answer in enumerate(found) if answer.error]:
            raise ValueError(wrong[0][1] if len(found) == 1 else f"prompt {wrong[0][0]}: {wrong[0][1]} ({len(wrong)} of {len(found)} failed)")
        return [answer.text for answer in found]

    def answers(
        self,
        images: ImageInputs,
        prompts: Texts,
        max_new_tokens: int = 128,
        sampler: Strategy = Greedy(),
        *,
        seeds: Sequence[int] | None = None,
        min_new_tokens: int = 0,
        stop: Texts | None = (),
        allowed: np.ndarray | None = None,
        batch_size: int = 16,
        progress: bool | None = None,
    ) -> list[Answer]:
        """An `Answer` to every prompt, in their order. Any number of prompts: they are sorted into length buckets and batched.

        Args:
            images: paths, PIL images or uint8 arrays [H, W, 3], one a prompt, or a list of them a prompt.
            prompts: one text or several.
            max_new_tokens: of each answer at most, end included; an answer ends before them with one of the checkpoint's eos ids.
            sampler: `Greedy`, `Sample`, `Beam` or `BestOf`.
            seeds: one integer a prompt, on which `Sample` depends beside the prompt itself; by default 0, 1, 2, ...
            min_new_tokens: no end before so many.
            stop: texts that end an answer, whose text is then what came before, and whose tokens and score go on to where one is complete;
                BestOf chooses by these scores. Beam does not see them (transformers ends a beam there): they cut what it found.
            allowed: bool[V], or bool[B, V] for a mask a prompt: the ids that may be said (`processor.tokenizer` knows them).
            batch_size: prompts at a time.
            progress: a bar on stderr; by default if there are several batches and somebody is looking.

        An image given twice (the same path or object) is encoded once. The prefix of several prompts on one image is not shared:
        image tokens see the prompt, so their keys and values differ from prompt to prompt.
        ValueError if the inputs do not fit together, or prompt and answer the context; an image that fails is told in its own Answer.
        """
        rows = self.processor.rows(images, prompts)
        options: Any = dict(seeds=seeds, min_new_tokens=min_new_tokens, stop=stop, allowed=allowed, batch_size=batch_size, progress=progress)
        found = {i: answer for batch in self.batches(rows, max_new_tokens, sampler, **options) for i, answer in batch.items()}
        return [found[i] for i in range(len(rows))]

    def batches(
        self,
        rows: list[EncodedPrompt],
        max_new_tokens: int = 128,
        sampler: Strategy = Greedy(),
        *,
        seeds: Sequence[int] | None = None,
        min_new_tokens: int = 0,
        stop: Texts | None = (),
        allowed: np.ndarray | None = None,
        batch_size: int = 16,
        progress: bool | None = None,
    ) -> Iterator[dict[int, Answer]]:
        """`answers` to what `processor.rows` made, as they come: of each batch, by the numbers of its rows."""
        self._check_room(rows, max_new_tokens, batch_size)
        if not isinstance(sampler, Strategy):
            raise ValueError(f"sampler is {sampler!r}: pass Greedy(), Sample(...), Beam(...) or BestOf(...)")
        chosen, sayable = check_seeds(seeds, len(rows)), self._allowed(allowed, len(rows))
        stops = check_stops(stop)
        ends: Ends | None = (lambda tokens: np.array([self._end(row, stops) for row in tokens.tolist()])) if stops else None
        new = round_up(max_new_tokens)

        def run(inputs: Inputs, features: jax.Array, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mask = sayable if sayable.ndim == 1 else sayable[numbers]
            options: dict[str, Any] = dict(seeds=chosen[numbers], allowed=mask, min_new_tokens=min_new_tokens, features=features, ends=ends)
            found = generate.generate(self.model, inputs, max_new_tokens, sampler=sampler, slots=inputs.tokens.shape[1] + new, **options)
            return found.tokens, found.log_probabilities

        for found in run_batches(self.model, self.processor, rows, run, batch_size, progress):
            yield {
                i: Answer("", [], [], 0.0, str(one)) if isinstance(one, ValueError) else self._answer(one, stops, sampler) for i, one in found.items()
            }

    def detect(self, image: ImageSource, label: str, **options: Any) -> Detections:
        """Where a thing ("cat"; "cat ; dog") is on an image: its `Detection`s, boxes in pixels, with scores. Options are those of `answers`."""
        return self._pointed(image, f"detect {label}", options)

    def segment(self, image: ImageSource, label: str, **options: Any) -> Detections:
        """As `detect`, with the masks too. ValueError if the checkpoint has no mask codec."""
        _ = self.codec  # told at once
        return self._pointed(image, f"segment {label}", options)

    def detections(self, answer: Answer | str, image: ImageSource) -> Detections:
        """What an answer points at, in pixels of the image that it is about: `processing.locations.Detections`.

        They have scores if `answer` is an `Answer`, and masks where it says any, for which a codec is needed: ValueError if there is none.
        """
        return pointing.detections(self, answer, image)

    def _pointed(self, image: ImageSource, prompt: str, options: dict[str, Any]) -> Detections:
        (answer,) = self.answers(image, prompt, **options)
        if answer.error:
            raise ValueError(answer.error)
        return self.detections(answer, image)

    def stream(
        self,
        image: Any,
        prompt: str,
        max_new_tokens: int = 128,
        sampler: Greedy | Sample = Greedy(),
        *,
        seed: int = 0,
        min_new_tokens: int = 0,
        stop: Texts | None = (),
        allowed: np.ndarray | None = None,
    ) -> Iterator[str]:
        """The answer piece by piece, as soon as its text is certain; several tokens are decoded per dispatch.

        image: one image, or a list of those of this prompt. Other arguments are those of `answers`; the pieces joined are what `generate` gives.
        """
        rows = self.processor.rows([image] if isinstance(image, list | tuple) and "<image>" not in prompt else image, prompt)
        self._check_room(rows, max_new_tokens, 1)
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler is {sampler!r}: what is streamed is final, so pass Greedy() or Sample(...)")
        seeds, stops = check_seeds([seed], 1), check_stops(stop)
        length = min(round_up(len(rows[0].prompt)), self.processor.context)
        inputs = Inputs(images=pixel_values(list(rows[0].images), self.processor.image_size), **self.processor.pad(rows, length=length))
        slots = length + round_up(max_new_tokens)
        generate.check_lengths(length, max_new_tokens, min_new_tokens, slots)
        request = make_request(self.model, 1, seeds, self._allowed(allowed, 1), min_new_tokens)
        state = generate.prefill(self.model, inputs, generate.encode_inputs(self.model, inputs), request, slots, sampler)
        ids, told = [], 0
        for tokens, _ in generate.decode_chunks(self.model, state, request, max_new_tokens, STREAM, sampler):
            ids += tokens[0].tolist()
            ended = len(ids) >= max_new_tokens or any(i in self.config.eos_token_ids for i in ids)
            text = self.processor.decode(ids if ended else ids[: self.processor.tokenizer.settled(ids)])
            cut = _cut(text, stops)
            certain = cut if ended or len(cut) < len(text) else cut[: max(told, len(cut) - max(map(len, stops), default=1) + 1)]
            if len(certain) > told:
                yield certain[told:]
                told = len(certain)
            if ended or len(cut) < len(text):
                return

    def score(self, images: ImageInputs, prompts: Texts, suffixes: Texts, *, batch_size: int = 16, progress: bool | None = None) -> np.ndarray:
        """float32[B]: the log-probability of every suffix and its eos, given image and prompt. Any number of them, batched as in `answers`."""
        if suffixes is None:
            raise ValueError("no suffixes: pass the text to score, one for each prompt")
        rows = self.processor.rows(images, prompts, suffixes)
        self._check_rows(rows, batch_size)
        run = lambda inputs, features, numbers: (scoring.score(self.model, inputs, features),)
        found = {i: one for batch in run_batches(self.model, self.processor, rows, run, batch_size, progress) for i, one in batch.items()}
        for i in sorted(found):
            if isinstance(found[i], ValueError):
                raise found[i]
        return np.concatenate([found[i] for i in range(len(rows))])

    def logits(self, images: ImageInputs | Inputs, prompts: Texts | None = None, suffixes: Texts | None = None) -> tuple[np.ndarray, Inputs]:
        """Teacher-forced logits float32[B, T, V] (those at t are for the token at t + 1) and the `Inputs` they belong to. Also `logits(inputs)`."""
        inputs = self._inputs(images, prompts, suffixes)
        return np.asarray(scoring.forward(self.model, inputs)), inputs

    def stages(
        self, images: ImageInputs | Inputs, prompts: Texts | None = None, suffixes: Texts | None = None, attention: bool = False
    ) -> dict[str, np.ndarray]:
        """Every stage's output by name, in the order of computation, as one teacher-forced pass goes by:

        vision/patches, vision/embeddings, vision/layers/0, ..., vision/output, projector, decoder/embeddings, decoder/layers/0, ...,
        decoder/norm, logits; with `attention` also vision/layers/0/attention/weights [M, N, P, P], ... and decoder/layers/0/attention/weights
        [B, N, T, T], ... (much memory at 896 pixels: no query chunks then).
        """
        found = scoring.forward_stages(self.model, self._inputs(images, prompts, suffixes), attention)
        return {name: np.asarray(value) for name, value in found.items()}

    def _inputs(self, images: Any, prompts: Texts | None, suffixes: Texts | None) -> Inputs:
        if isinstance(images, Inputs):
            _check(images, self.config)
            return images
        if prompts is None:
            raise ValueError("no prompts: pass images and prompts, or Inputs")
        return self.processor(images, prompts, suffixes)

    def _check_room(self, rows: list[EncodedPrompt], max_new_tokens: int, batch_size: int) -> None:
        self._check_rows(rows, batch_size)
        tokens, limit = max(len(row.prompt) for row in rows), self.processor.context
        if not is_integer(max_new_tokens) or not 1 <= max_new_tokens <= limit - tokens:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}: with a prompt of {tokens} tokens it can be 1 to {limit - tokens}")

    def _check_rows(self, rows: list[EncodedPrompt], batch_size: int) -> None:
        if max(len(row.prompt) + len(row.suffix) for row in rows) > self.processor.context:
            self.processor.pad(rows)  # says which row is too long
        if not is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: it can be 1 or more")

    def _allowed(self, allowed: np.ndarray | None, rows: int) -> np.ndarray:
        """bool[V] or bool[B, V]: what is asked for, of the ids that stand for text; not `<image>` and the padding rows of the embedding table."""
        ids = np.arange(self.config.decoder.vocab_size)
        sayable = (ids < self.processor.tokenizer.vocab_size) & (ids != self.config.image_token_id)
        if allowed is None:
            return sayable
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.shape not in ((len(ids),), (rows, len(ids))):
            raise ValueError(f"allowed is {allowed.dtype}{list(allowed.shape)}: pass bool[{len(ids)}] or bool[{rows}, {len(ids)}]")
        if not (allowed & sayable).any(axis=-1).all():
            raise ValueError("allowed allows no token that stands for text")
        return allowed & sayable

    def _end(self, tokens: list[int], stops: list[str]) -> int:
        """How many of `tokens` are up to and with eos, or the one that completes a stop text; one more than all if nothing ends them."""
        end = next((n for n, token in enumerate(tokens, 1) if token in self.config.eos_token_ids), len(tokens) + 1)
        stopped = lambda n: _cut(text := self.processor.decode(tokens[:n]), stops) != text
        return bisect_left(range(end), True, key=stopped) if stops else end

    def _answer(self, found: tuple[np.ndarray, np.ndarray], stops: list[str], sampler: Strategy) -> Answer:
        end = self._end(found[0].tolist(), stops)
        tokens, log_probabilities = (part[:end].tolist() for part in found)
        score = sum(log_probabilities) / len(tokens) ** (sampler.length_penalty if isinstance(sampler, Beam) else 0)
        return Answer(_cut(self.processor.decode(tokens), stops), tokens, log_probabilities, score)


def check_stops(stop: Texts | None) -> list[str]:
    """As a list. ValueError if that is no text, or an empty one."""
    stops = [stop] if isinstance(stop, str) else list(() if stop is None else stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop is {stop!r}: pass a text that is not empty, or a list of such")
    return stops


def _cut(text: str, stops: list[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _check(inputs: Inputs, config: PaliGemmaConfig) -> None:
    """ValueError for what a compiled program would clip to something that fits."""
    tokens, rows = np.asarray(inputs.tokens), config.decoder.vocab_size
    image = tokens == config.image_token_id
    if (strange := tokens[~image & ((tokens < 0) | (tokens >= rows))]).size:
        raise ValueError(f"token {strange[0]} is outside the vocabulary of {rows}")
    if len(inputs.images) and image.sum() != len(inputs.images) * config.vision.num_patches:
        raise ValueError(f"{image.sum()} image tokens for {len(inputs.images)} images of {config.vision.num_patches} each")


def check_seeds(seeds: Sequence[int] | None, rows: int) -> np.ndarray:
    """One for each row, by default 0, 1, 2, ... ValueError for what is no whole number of 32 bits, or of another count."""
    if seeds is None:
        return np.arange(rows)
    if np.ndim(seeds) != 1:
        raise ValueError(f"seeds is {seeds!r}: pass a list, one whole number for each prompt")
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: pass one for each")
    for seed in seeds:
        if not is_integer(seed) or not -(2**31) <= seed < 2**31:
            raise ValueError(f"a seed is {seed!r}: pass whole numbers of 32 bits")
    return np.asarray(seeds)
