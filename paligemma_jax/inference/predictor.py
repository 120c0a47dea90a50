"""`Predictor`: a model with its processor, which answers prompts about images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32

from paligemma_jax.inference import scoring
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.answering import answer_inputs, stream_answer
from paligemma_jax.inference.inspector import Edit, Inspector, require_prompts
from paligemma_jax.inference.options import DecodingOptions, Keyword, Texts
from paligemma_jax.inference.sampler import Sampler
from paligemma_jax.inference.sampling import Strategy
from paligemma_jax.inference.streaming import StreamedToken
from paligemma_jax.inference.views import BoxOptions, answer_with_boxes
from paligemma_jax.interpretability.names import check_edits
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.edits import Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.locations import Detections, join_labels, parse_detections, with_masks
from paligemma_jax.processing.mask_codec import NO_CODEC, MaskCodec, load_codec
from paligemma_jax.processing.processor import EncodedPrompt, ImageInputs, Inputs, Processor


@dataclass(frozen=True)
class Predictor(Inspector):
    """A loaded PaliGemma. `images`, `prompts` and `suffixes` are those of `Processor`.

    Methods that generate take the fields of `DecodingOptions` as keywords, or all of them as
    `options=DecodingOptions(...)`.
    """

    model: PaliGemma
    processor: Processor
    codec_file: Path | None = None  # file of the mask codec

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        size, dtype = self.config.vision.image_size, self.config.dtype
        return f"Predictor({count:,} parameters, {size} pixels, {dtype})"

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @cached_property
    def codec(self) -> MaskCodec:
        """Translates between `<seg>` tokens and masks. ValueError if the checkpoint has none."""
        if self.codec_file is None:
            raise ValueError(NO_CODEC)
        return load_codec(self.codec_file)

    def generate(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        max_new_tokens: int | None = None,
        sampler: Strategy | None = None,
        **options: Keyword,
    ) -> list[str]:
        """Answer every prompt. Returns the answers as text without special tokens.

        Arguments are those of `answers`. If an image cannot be read, the first error is raised when
        all other prompts are answered; `answers` returns the errors and keeps the rest.
        """
        answers = self.answers(images, prompts, max_new_tokens, sampler, **options)
        errors = {i: answer.error for i, answer in enumerate(answers) if answer.error}
        if errors:
            i, error = next(iter(errors.items()))
            summary = f"prompt {i}: {error} ({len(errors)} of {len(answers)} failed)"
            raise ValueError(error if len(answers) == 1 else summary)
        return [answer.text for answer in answers]

    def answers(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        max_new_tokens: int | None = None,
        sampler: Strategy | None = None,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool | None = None,
        boxes: BoxOptions = BoxOptions(),
        **options: Keyword,
    ) -> list[Answer]:
        """Answer every prompt, in order, with tokens and scores.

        There may be any number of prompts: they are sorted by length and batched. An image that
        occurs twice (the same path or object) is encoded once. Prompts about one image do not share
        a prefix: image tokens attend to the prompt, so their keys and values differ.

        Args:
            images: Images (`load_image`): one for all prompts, or one, or a list of them, per
                prompt; None for text alone; or `Inputs` without targets, which run in one batch.
            prompts: One text or several.
            max_new_tokens: Maximum length of an answer in tokens; by default 128.
            sampler: `Greedy` (the default), `Sample`, `Beam`, `BestOf` or a `Sampler` of your own.
            seeds: One integer per prompt, which together with the prompt determines what `Sample`
                draws; by default 0, 1, 2, ...
            batch_size: Maximum number of prompts in a batch.
            progress: Whether to report progress; by default for several batches on a terminal.
            boxes: Views of each image, and duplicates, of boxes in the answers.
            options: Other fields of `DecodingOptions`.

        Raises:
            ValueError: The arguments do not fit together, or prompt and answer do not fit the
                context. An image that cannot be read is an error in its own `Answer` only.
        """
        decoding = DecodingOptions.resolve(max_new_tokens, sampler, **options)
        if isinstance(images, Inputs):
            if boxes.changes:
                raise ValueError(
                    "boxes must be left out with Inputs, which have no images to shift"
                )
            inputs = self._inputs(images, prompts, None)
            return answer_inputs(self.model, self.processor, inputs, decoding, seeds)
        encoded = self.processor.encode(images, require_prompts(prompts))
        batches = self.batches(
            encoded, decoding, seeds=seeds, batch_size=batch_size, progress=progress, boxes=boxes
        )
        answers = {i: answer for batch in batches for i, answer in batch.items()}
        return [answers[i] for i in range(len(encoded))]

    def batches(
        self,
        prompts: list[EncodedPrompt],
        options: DecodingOptions = DecodingOptions(),
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool | None = None,
        boxes: BoxOptions = BoxOptions(),
    ) -> Iterator[dict[int, Answer]]:
        """Answer encoded prompts. Yields the answers of each batch by prompt number."""
        return answer_with_boxes(
            self.model, self.processor, prompts, options, boxes, seeds, batch_size, progress
        )

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        **options: Keyword,
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; the pieces join to the answer of `generate`.

        A piece is yielded as soon as no later token can change it. Several tokens are decoded per
        dispatch. Other arguments are those of `answers`.

        Args:
            image: One image, the list of images of this prompt, or None for text alone.
            sampler: `Greedy` (the default), `Sample` or a `Sampler` of your own.
        """
        decoding = DecodingOptions.resolve(max_new_tokens, sampler, **options)
        for tokens in self._stream(image, prompt, decoding, seed):
            piece = "".join(token.text for token in tokens)
            if piece:
                yield piece

    def stream_tokens(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        **options: Keyword,
    ) -> Iterator[StreamedToken]:
        """Answer one prompt token by token, with log-probabilities; otherwise as `stream`."""
        decoding = DecodingOptions.resolve(max_new_tokens, sampler, **options)
        yield from chain.from_iterable(self._stream(image, prompt, decoding, seed))

    def _stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        options: DecodingOptions,
        seed: int,
    ) -> Iterator[list[StreamedToken]]:
        encoded = self._encode_one(image, prompt)
        return stream_answer(self.model, self.processor, encoded, options, seed)

    def _encode_one(
        self, image: ImageSource | Sequence[ImageSource] | None, prompt: str
    ) -> EncodedPrompt:
        is_group = isinstance(image, list | tuple) and "<image>" not in prompt
        (encoded,) = self.processor.encode([image] if is_group else image, prompt)
        return encoded

    def detect(
        self,
        image: ImageSource,
        label: Texts,
        *,
        views: int = 1,
        nms: float | None = None,
        confidence: Literal["box", "label"] = "box",
        **options: Keyword,
    ) -> Detections:
        """Detect objects ("cat"; ["cat", "dog"]) in an image: boxes in pixels, with scores.

        Args:
            views: 1, 5 or 9 views of the image, shifted by a few pixels. Their boxes are fused:
                more exact, with scores that are probabilities, at several times the cost.
            nms: Drop boxes that overlap a better one of their label by more than this (intersection
                over union).
            confidence: Tokens whose probabilities make the scores: of box and label, or of the
                label alone, for models trained with noise boxes.
            options: Further arguments of `answers`.
        """
        boxes = BoxOptions(views, nms, confidence)
        return self._answer_detections(image, f"detect {join_labels(label)}", boxes, options)

    def segment(
        self,
        image: ImageSource,
        label: Texts,
        *,
        views: int = 1,
        nms: float | None = None,
        confidence: Literal["box", "label"] = "box",
        **options: Keyword,
    ) -> Detections:
        """Detect objects with their masks; arguments are those of `detect`.

        Raises:
            ValueError: The checkpoint has no mask codec.
        """
        _ = self.codec  # raises before the model runs
        boxes = BoxOptions(views, nms, confidence)
        return self._answer_detections(image, f"segment {join_labels(label)}", boxes, options)

    def detections(self, answer: Answer | str, image: ImageSource) -> Detections:
        """Parse the detections in an answer about an image, in pixels.

        They have scores if `answer` is an `Answer`, and masks if it has `<seg>` tokens, which needs
        a mask codec: ValueError if the checkpoint has none.
        """
        size = load_image(image).size
        tokenizer = self.processor.tokenizer
        text = answer if isinstance(answer, str) else list(answer.pieces(tokenizer))
        detections = parse_detections(text, size)
        has_masks = any(detection.codes for detection in detections)
        return with_masks(detections, size, self.codec) if has_masks else detections

    def _answer_detections(
        self, image: ImageSource, prompt: str, boxes: BoxOptions, options: dict[str, Keyword]
    ) -> Detections:
        (answer,) = self.answers(image, prompt, boxes=boxes, **options)
        if answer.error:
            raise ValueError(answer.error)
        return self.detections(answer, image)

    def score(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        suffixes: Texts | None = None,
        *,
        batch_size: int = 16,
        progress: bool | None = None,
        edit: Edit = None,
    ) -> Float32[np.ndarray, " B"]:
        """Compute the log-probability of every suffix and its eos, batched as in `answers`, or of
        the targets of `Inputs`, in one batch."""
        edits = Edits.of(edit)
        if isinstance(images, Inputs):
            inputs = self._inputs(images, prompts, suffixes)
            check_edits(self.model, edits, inputs.images is not None, True, computes_logits=False)
            return scoring.score(self.model, inputs, edits=edits)
        if suffixes is None:
            raise ValueError("no suffixes: pass the text to score, one per prompt")
        encoded = self.processor.encode(images, require_prompts(prompts), suffixes)
        has_images = any(prompt.images for prompt in encoded)
        check_edits(self.model, edits, has_images, computes_logits=False)
        return scoring.score_prompts(
            self.model, self.processor, encoded, batch_size, progress, edits
        )

    def logits(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        suffixes: Texts | None = None,
        *,
        edit: Edit = None,
    ) -> tuple[Float32[np.ndarray, "B T V"], Inputs]:
        """Compute teacher-forced logits; those at t predict the token at t + 1.

        Returns the logits and the inputs that they belong to. `Inputs` may be passed directly.
        `edit` is that of `stages`.
        """
        inputs, edits = self._inputs(images, prompts, suffixes), Edits.of(edit)
        check_edits(self.model, edits, inputs.images is not None, by_row=True)
        return np.asarray(scoring.forward(self.model, inputs, edits)), inputs
