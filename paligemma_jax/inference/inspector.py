"""The methods of `Predictor` that look inside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from paligemma_jax.inference import scoring
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.answering import answer_batches
from paligemma_jax.inference.batching import pad_batch
from paligemma_jax.inference.options import DecodingOptions, Keyword, Texts
from paligemma_jax.interpretability.attribution import saliency
from paligemma_jax.interpretability.lens import LogitLens, logit_lens
from paligemma_jax.interpretability.names import check_edits, check_names, chosen, stage_shapes
from paligemma_jax.model.edits import Change, Edits
from paligemma_jax.model.layers import full_dtype
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import Fed, collect_stages
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import (
    AnyArray,
    EncodedPrompt,
    ImageInputs,
    Inputs,
    Processor,
    is_list,
)
from paligemma_jax.sharding.compiled import mesh_jit

Edit: TypeAlias = Mapping[str, Change] | Edits | None
Stages: TypeAlias = dict[str, Float[np.ndarray, "..."]]


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoder makes of M images of P patches."""

    encoded: Float32[np.ndarray, "M P W"]  # the output of SigLIP
    projected: Float32[np.ndarray, "M P D"]  # in the space of the decoder's embeddings


class Inspector:
    """A model with its processor, to look inside."""

    model: PaliGemma
    processor: Processor

    def stage_names(self, images: bool = True) -> list[str]:
        """The name of every stage, in order of computation; without `images`, of text alone."""
        return list(stage_shapes(self.model, images))

    def stages(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        suffixes: Texts | None = None,
        attention: bool = False,
        branches: bool = False,
        fed: Fed = MappingProxyType({}),
        *,
        only: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        edit: Edit = None,
    ) -> Stages:
        """Compute the stages of a teacher-forced pass, by name and in order of computation.

        By default these are vision/patches, vision/embeddings, vision/layers/0, ..., vision/output,
        projector, decoder/embeddings, decoder/layers/0, ..., decoder/norm, logits.

        Args:
            attention: Also collect attention weights: vision/layers/0/attention/weights
                [M, N, P, P], ..., decoder/layers/0/attention/weights [B, N, T, T], ... This takes
                much memory at 896 pixels, because queries are not processed in chunks.
            branches: Also collect what each attention and MLP adds to the residual stream:
                decoder/layers/0/attention/output, decoder/layers/0/mlp/output, ...
            fed: Values by stage name, attention weights and branches included, with which the model
                continues in place of its own. The model's own value is still returned.
            only: Names, or regular expressions for complete names, of the stages to collect, and of
                no others; any of `stage_names`.
            batch_size: Maximum number of rows to compute at a time; by default all.
            edit: Changes by stage name or regular expression: an array that takes the stage's
                place, or a function of its value (`paligemma_jax.model.edits`). The model's own
                value is returned.

        Raises:
            ValueError: A name is not a stage, or a fed value or a change does not fit its stage.
        """
        inputs, edits = self._inputs(images, prompts, suffixes), Edits.of(edit)
        has_images, patterns = inputs.images is not None, chosen(only)
        if patterns is not None:
            check_names("only", patterns, self.stage_names(has_images))
        by_row = batch_size is None or batch_size >= len(inputs.tokens)
        check_edits(self.model, edits, has_images, by_row=by_row)
        if fed and not by_row:
            raise ValueError("fed must be given without batch_size, because it has all rows")
        options = attention, branches, dict(fed), patterns, edits
        results = [
            jax.tree.map(np.asarray, scoring.forward_stages(self.model, batch, *options))
            for batch in self._row_batches(inputs, batch_size)
        ]
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([r[name] for r in results]) for name in results[0]}

    def generation_stages(
        self,
        images: ImageInputs,
        prompts: Texts,
        *,
        only: str | Sequence[str] | None = None,
        attention: bool = False,
        branches: bool = False,
        batch_size: int = 16,
        **options: Keyword,
    ) -> tuple[list[Answer], Stages, Inputs]:
        """Answer prompts, and compute the stages of every prompt and answer token.

        They come from one teacher-forced pass over prompts and answers, which equals generation
        token by token up to rounding. Stages at t belong to the token at t; logits at t predict the
        one at t + 1.

        Args:
            options: Fields of `DecodingOptions`, `edit` included.

        Returns:
            The answers; the stages, as from `stages`; and the inputs with the answers as targets.
        """
        decoding = DecodingOptions.resolve(**options)
        encoded = self.processor.encode(images, prompts)
        answers = self._answers(encoded, decoding, batch_size)
        inputs = self._with_answers(encoded, answers)
        stages = self.stages(
            inputs,
            attention=attention,
            branches=branches,
            only=only,
            batch_size=batch_size,
            edit=decoding.edit,
        )
        return answers, stages, inputs

    def logit_lens(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        suffixes: Texts | None = None,
        *,
        k: int = 5,
        edit: Edit = None,
    ) -> LogitLens:
        """Compute what each layer would predict, by the final norm and the output head.

        Without suffixes, the answers are generated first (greedily), to be predicted.
        """
        inputs, edits = self._answered(images, prompts, suffixes, edit), Edits.of(edit)
        check_edits(self.model, edits, inputs.images is not None, True, computes_logits=False)
        return logit_lens(self.model, inputs, k, edits)

    def saliency(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None = None,
        suffixes: Texts | None = None,
        *,
        edit: Edit = None,
    ) -> Float32[np.ndarray, "*images S S"]:
        """Compute how much each pixel matters to the answer of its row: the length of the gradient
        of the answer's log-probability.

        Without suffixes, the answers are generated first (greedily).
        """
        inputs, edits = self._answered(images, prompts, suffixes, edit), Edits.of(edit)
        if inputs.images is None:
            raise ValueError("saliency needs images, got text alone")
        check_edits(self.model, edits, True, True, computes_logits=False)
        return np.asarray(saliency(self.model, inputs, edits))

    def embed_images(
        self, images: ImageSource | Sequence[ImageSource], batch_size: int = 16
    ) -> ImageFeatures:
        """Encode images: features of SigLIP, and as the decoder reads them."""
        listed: list = list(images) if is_list(images) else [images]
        if not listed:
            raise ValueError("no image: pass at least one, such as a path or a PIL image")
        parts = []
        for start in range(0, len(listed), batch_size):
            pixels = self.processor.pixel_values(listed[start : start + batch_size])
            parts.append(
                [
                    np.asarray(array, full_dtype(array.dtype))
                    for array in _encode(self.model, pixels)
                ]
            )
        encoded, projected = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ImageFeatures(encoded, projected)

    def embed_texts(self, texts: Texts) -> list[Float32[np.ndarray, "T D"]]:
        """Look up the input embeddings of each text's tokens, without bos and newline, in the space
        of `embed_images(...).projected`."""
        tokenizer = self.processor.tokenizer
        listed = [texts] if isinstance(texts, str) else list(texts)
        rows = [np.array([tokenizer.encode(text)], np.int32) for text in listed]
        embedded = [_embed(self.model, row)[0] for row in rows]
        return [np.asarray(x, full_dtype(x.dtype)) for x in embedded]

    def _inputs(
        self, images: ImageInputs | Inputs, prompts: Texts | None, suffixes: Texts | None
    ) -> Inputs:
        if isinstance(images, Inputs):
            if prompts is not None:
                raise ValueError("prompts must be left out with Inputs, which contain them")
            scoring.check_inputs(self.model, images)
            return images
        return self.processor(images, require_prompts(prompts), suffixes)

    def _answered(
        self,
        images: ImageInputs | Inputs,
        prompts: Texts | None,
        suffixes: Texts | None,
        edit: Edit,
    ) -> Inputs:
        """Inputs whose targets are the suffixes, or answers that are generated."""
        if isinstance(images, Inputs) or prompts is None or suffixes is not None:
            return self._inputs(images, prompts, suffixes)
        encoded = self.processor.encode(images, prompts)
        return self._with_answers(encoded, self._answers(encoded, DecodingOptions(edit=edit), 16))

    def _answers(
        self, encoded: list[EncodedPrompt], options: DecodingOptions, batch_size: int
    ) -> list[Answer]:
        batches = answer_batches(
            self.model, self.processor, encoded, options, batch_size=batch_size, progress=False
        )
        answers = {i: answer for batch in batches for i, answer in batch.items()}
        for answer in answers.values():
            if answer.error:
                raise ValueError(answer.error)
        return [answers[i] for i in range(len(encoded))]

    def _with_answers(self, encoded: list[EncodedPrompt], answers: list[Answer]) -> Inputs:
        answered = [
            replace(prompt, suffix=list(answer.tokens))
            for prompt, answer in zip(encoded, answers, strict=True)
        ]
        images = self.processor.prompt_images(encoded)
        return replace(pad_batch(self.processor, answered), images=images)

    def _row_batches(self, inputs: Inputs, batch_size: int | None) -> Iterator[Inputs]:
        """Rows with their images, `batch_size` at a time."""
        rows = len(inputs.tokens)
        if batch_size is None or batch_size >= rows:
            yield inputs
            return
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        config = self.model.config
        is_image = np.asarray(inputs.tokens) == config.image_token_id
        ends = np.cumsum(is_image.sum(axis=1)) // config.vision.num_patches
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            text = {
                name: getattr(inputs, name)[part]
                for name in ("tokens", "valid", "prefix", "targets")
            }
            first, last = (ends[start - 1] if start else 0), ends[part][-1]
            images = None if inputs.images is None else inputs.images[first:last]
            yield Inputs(images=images, **text)


def require_prompts(prompts: Texts | None) -> Texts:
    """Return the prompts. ValueError if there are none."""
    if prompts is None:
        raise ValueError("no prompts: pass images and prompts, or Inputs")
    return prompts


@mesh_jit
def _encode(model: PaliGemma, images: Float[AnyArray, "M S S 3"]) -> tuple[Array, Array]:
    with collect_stages(only=["vision/output"]) as stages:
        projected = model.encode_images(images)
    return stages["vision/output"], projected


@mesh_jit
def _embed(model: PaliGemma, tokens: Int[AnyArray, "B T"]) -> Float[Array, "B T D"]:
    return model.embed(tokens, None)
