"""Images and text to `Inputs`, as in transformers' PaliGemmaProcessor; token ids to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from paligemma_jax.processing.image import ImageSource, pixel_values
from paligemma_jax.processing.image_settings import ImageSettings
from paligemma_jax.processing.tokenizer import IMAGE, Tokenizer

if TYPE_CHECKING:
    AnyArray = Any  # either kind: a union would need a conversion wherever one of them is passed
else:
    AnyArray = jax.Array | np.ndarray
# One image for all prompts; or for each prompt one image, a list of images, or None for text alone.
ImageInputs = ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None

BUCKET = 32  # lengths are padded to multiples of this, so that few programs are compiled


def round_up(length: int) -> int:
    """The next multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """The inputs of the model, a pytree. The processor fills it with numpy arrays.

    In transformers: tokens are input_ids, valid is attention_mask, targets are token_type_ids (so
    prefix is valid & ~targets), images are pixel_values with channels last, and labels are tokens
    where targets is True and -100 elsewhere.
    """

    tokens: Int[AnyArray, "B T"]
    images: Float[AnyArray, "*images S S 3"] | None  # in the order of their tokens
    valid: Bool[AnyArray, "B T"]  # False on pads
    prefix: Bool[AnyArray, "B T"]  # True on image and prompt
    targets: Bool[AnyArray, "B T"]  # True on suffix and eos


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as token ids, with its images not opened yet."""

    images: tuple[ImageSource, ...]
    prompt: list[int]  # soft prompt, image tokens, bos, text and newline
    suffix: list[int]  # text and eos; empty without suffix
    untrained: tuple[int, ...] = ()  # indices into the suffix of tokens that are no targets

    def __len__(self) -> int:
        return len(self.prompt) + len(self.suffix)


@dataclass(frozen=True)
class Processor:
    """Turns images and text into `Inputs`, and token ids into text."""

    tokenizer: Tokenizer
    image_size: int  # S: pixels per side
    image_tokens: int  # per image: (S / patch size) squared
    context: int = 8192  # maximum number of tokens of a row, images included
    image_settings: ImageSettings = field(default_factory=ImageSettings)
    soft_tokens: range = range(0)  # ids of a soft prompt, in front of each prompt

    def __call__(
        self,
        images: ImageInputs,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        length: int | None = None,
    ) -> Inputs:
        """Make the inputs for B prompts.

        A row is `<image>` x image_tokens for each image, `<bos>`, the prompt, a newline, then
        suffix and `<eos>` if there is a suffix.

        Args:
            images: An image (`load_image`) for all prompts; a list with one of them, a list of
                them, or None per prompt; or None for text alone, which transformers' processor
                refuses (a row is then as in big_vision, without image tokens). If the prompts
                contain `<image>` where their images go, one flat list for all prompts is accepted
                too; `<bos>` then follows the last `<image>`.
            prompts: One text or several.
            suffixes: The answers to train on or to score, one per prompt.
            padding_side: "left" (for generation) or "right".
            length: Number of tokens to pad to; by default that of the longest row.

        Raises:
            ValueError: The arguments do not fit together, or a row does not fit. Nothing is
                truncated, dropped or repeated.
        """
        encoded = self.encode(images, prompts, suffixes)
        return Inputs(images=self.prompt_images(encoded), **self.pad(encoded, padding_side, length))

    def prompt_images(
        self, prompts: Sequence[EncodedPrompt]
    ) -> Float32[np.ndarray, "M S S 3"] | None:
        """Open the images of prompts; None if there are none."""
        images = [image for prompt in prompts for image in prompt.images]
        return self.pixel_values(images) if images else None

    def pixel_values(self, images: Sequence[ImageSource]) -> Float32[np.ndarray, "M S S 3"]:
        """Turn images into pixels with the settings of the checkpoint (`image.pixel_values`)."""
        return pixel_values(images, self.image_size, self.image_settings)

    def encode(
        self,
        images: ImageInputs,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
    ) -> list[EncodedPrompt]:
        """Tokenize prompts and assign their images, without opening an image.

        Arguments and errors are those of a call.
        """
        texts = _texts(prompts, "prompt")
        answers = [None] * len(texts) if suffixes is None else _texts(suffixes, "suffix")
        if len(answers) != len(texts):
            raise ValueError(
                f"{len(answers)} suffixes for {len(texts)} prompts: pass one per prompt"
            )
        if any(answer and IMAGE in answer for answer in answers):
            raise ValueError(f"a suffix contains {IMAGE}, which the model cannot generate")
        flat, texts = _assign_images(images, texts)
        remaining = iter(flat)
        return [
            EncodedPrompt(
                tuple(islice(remaining, text.count(IMAGE))),
                self._prompt_ids(text),
                [] if answer is None else self.tokenizer.encode(answer + self.tokenizer.eos),
            )
            for text, answer in zip(texts, answers, strict=True)
        ]

    def padded_length(self, prompts: Sequence[EncodedPrompt], length: int | None = None) -> int:
        """Return `length`, or the length of the longest prompt.

        Raises:
            ValueError: A prompt is longer than `length` or the context.
        """
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        tokens = len(prompts[longest])
        limit, name, advice = self.context, "the context", "pass fewer images"
        if length is not None and length < self.context:
            limit, name, advice = length, "length", "pass fewer images or a larger length"
        if tokens > limit:
            images = prompts[longest].prompt.count(self.tokenizer.image_id)
            raise ValueError(
                f"prompt {longest} has {tokens} tokens, {images} of them for images, but {name} is "
                f"{limit}: shorten the text, or {advice}"
            )
        return tokens if length is None else length

    def pad(
        self,
        prompts: Sequence[EncodedPrompt],
        padding_side: str = "left",
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the fields of `Inputs` except images. Arguments and errors as in a call."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        length = self.padded_length(prompts, length)
        prefix = np.array([len(prompt.prompt) for prompt in prompts])[:, None]
        total = np.array([len(prompt) for prompt in prompts])[:, None]
        start = length - total if padding_side == "left" else np.zeros_like(total)
        place = np.arange(length) - start  # [B, T], 0 at the first token of the row
        valid = (place >= 0) & (place < total)
        tokens = np.full(valid.shape, self.tokenizer.pad_id, np.int32)
        ids = chain.from_iterable(prompt.prompt + prompt.suffix for prompt in prompts)
        tokens[valid] = list(ids)
        is_prefix = place < prefix
        targets = valid & ~is_prefix
        for row, prompt in enumerate(prompts):
            untrained = [len(prompt.prompt) + index for index in prompt.untrained]
            targets[row, np.isin(place[row], untrained)] = False
        return dict(tokens=tokens, valid=valid, prefix=valid & is_prefix, targets=targets)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without `<image>`, bos, eos and pads (see `Tokenizer.decode`)."""
        return self.tokenizer.decode(ids)

    def _prompt_ids(self, prompt: str) -> list[int]:
        before, image, after = prompt.rpartition(IMAGE)
        image_id = self.tokenizer.image_id
        ids = self.tokenizer.encode(f"{before}{image}{self.tokenizer.bos}{after}\n")
        repeated = ([i] * (self.image_tokens if i == image_id else 1) for i in ids)
        return [*self.soft_tokens, *chain.from_iterable(repeated)]


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value has several images or texts: a list, a tuple, a column of a data set."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
    listed: list = list(texts) if is_list(texts) else [texts]
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"{name} {i} must be a str, got {type(text).__name__}")
    if not listed:
        raise ValueError(f"no {name}: pass at least one (it may be empty text)")
    return listed


def _assign_images(
    images: ImageInputs | None, prompts: list[str]
) -> tuple[list[ImageSource], list[str]]:
    """Return all images in order, and each prompt with one `<image>` for each of its images.

    If only some prompts of a batch contain `<image>`, transformers writes bos inside the words of
    the others. Here that is an error.
    """
    placeholders = [prompt.count(IMAGE) for prompt in prompts]
    copies = len(prompts) if max(placeholders) <= 1 else 1  # of one image for all prompts
    entries: list = list(images) if is_list(images) else [images] * copies
    groups = [[] if x is None else list(x) if is_list(x) else [x] for x in entries]
    flat: list[ImageSource] = list(chain(*groups))
    given = [len(group) for group in groups]
    if not any(placeholders):
        if len(groups) != len(prompts):
            raise ValueError(
                f"got {len(groups)} images for {len(prompts)} prompts: "
                "pass one image, or one list of images, per prompt"
            )
        return flat, [IMAGE * n + prompt for n, prompt in zip(given, prompts, strict=True)]
    if not all(placeholders):
        raise ValueError(
            f"prompt {placeholders.index(0)} has no {IMAGE} but another prompt has: "
            "write it into every prompt or into none"
        )
    is_nested = any(map(is_list, entries))
    if (given != placeholders) if is_nested else (len(flat) != sum(placeholders)):
        counts = given if is_nested else len(flat)
        raise ValueError(
            f"{counts} images for {placeholders} {IMAGE} in the prompts: pass one image per {IMAGE}"
        )
    return flat, prompts
