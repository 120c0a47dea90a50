"""Images + prompts (+ suffixes) -> Inputs, as transformers' PaliGemmaProcessor makes them (NUMERICS section 3); ids -> text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import jax
import numpy as np

from paligemma_jax.processing.image import ImageSource, pixel_values
from paligemma_jax.processing.tokenizer import IMAGE, Tokenizer

Array = Any  # numpy from the Processor, jax inside a compiled function
ImageInputs = ImageSource | Sequence[ImageSource | Sequence[ImageSource]]

BUCKET = 32  # lengths are rounded up to a multiple of this, so that a new length within it compiles nothing


def round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What the model reads; a pytree. The Processor fills it with numpy arrays.

    In transformers' words: tokens is input_ids, valid attention_mask, targets token_type_ids (so prefix is valid & ~targets), images
    pixel_values with the channels last, and labels are tokens where targets holds and -100 elsewhere.
    """

    tokens: Array  # int32 [B, T]
    images: Array  # float32 [M, S, S, 3], in the order of their tokens, row after row
    valid: Array  # bool [B, T], False on pads
    prefix: Array  # bool [B, T], True on image and prompt
    targets: Array  # bool [B, T], True on suffix and eos


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids, with its images not yet opened."""

    images: tuple[ImageSource, ...]
    prompt: list[int]
    suffix: list[int]


@dataclass(frozen=True)
class Processor:
    """Turns what people have into Inputs, and ids into text."""

    tokenizer: Tokenizer
    image_size: int  # S: pixels on a side
    image_tokens: int  # per image: (S / patch size) squared
    context: int = 8192  # the longest row of tokens, images included

    def __call__(
        self,
        images: ImageInputs,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        length: int | None = None,
    ) -> Inputs:
        """Inputs for B prompts: `<image>` x image_tokens for each image, `<bos>`, the prompt as it is, a newline, then suffix and `<eos>` if given.

        Args:
          images: a path, PIL image or uint8 array; or a list with one of them, or a list of them, per prompt. Where the prompts say with
            `<image>` where the images go, one flat list for all of them does too; bos then follows the last `<image>` of each prompt.
          suffixes: what the model is to say, one per prompt, for training and scoring.
          padding_side: "left" (to generate) or "right".
          length: pads to this many tokens instead of to the longest row.

        Raises:
          ValueError: on anything that does not fit. Nothing is truncated, dropped or repeated to make it fit.
        """
        rows = self.rows(images, prompts, suffixes)
        flat = [image for row in rows for image in row.images]
        return Inputs(images=pixel_values(flat, self.image_size), **self.pad(rows, padding_side, length))

    def rows(self, images: ImageInputs, prompts: str | Sequence[str], suffixes: str | Sequence[str] | None = None) -> list[EncodedPrompt]:
        """The ids of every prompt and which images it has; no image is opened. Arguments and errors as those of a call."""
        prompts, suffixes = _texts(prompts, "prompt"), None if suffixes is None else _texts(suffixes, "suffix")
        if suffixes is not None and len(suffixes) != len(prompts):
            raise ValueError(f"{len(suffixes)} suffixes for {len(prompts)} prompts: pass one for each prompt")
        if any(IMAGE in suffix for suffix in suffixes or []):
            raise ValueError(f"a suffix contains {IMAGE}, but the model cannot say images: put it into the prompt")
        flat, prompts = _place(images, prompts)
        remaining = iter(flat)
        groups = [tuple(islice(remaining, prompt.count(IMAGE))) for prompt in prompts]
        heads = [self._prompt_ids(prompt) for prompt in prompts]
        tails = [[*self.tokenizer.encode(suffix), self.tokenizer.eos_id] for suffix in suffixes] if suffixes is not None else [[]] * len(heads)
        return [EncodedPrompt(*row) for row in zip(groups, heads, tails)]

    def pad(self, rows: Sequence[EncodedPrompt], padding_side: str = "left", length: int | None = None) -> dict[str, np.ndarray]:
        """The fields of `Inputs` but its images; ValueError if a row is longer than `length` or the context."""
        heads, tails = [row.prompt for row in rows], [row.suffix for row in rows]
        return _pad(heads, tails, self._length(heads, tails, length), padding_side, self.tokenizer.pad_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without `<image>`, bos, eos and pad (Tokenizer.decode)."""
        return self.tokenizer.decode(ids)

    def _prompt_ids(self, prompt: str) -> list[int]:
        before, image, after = prompt.rpartition(IMAGE)
        bos, image_id = self.tokenizer.bos_id, self.tokenizer.image_id
        ids = [*self.tokenizer.encode(before + image), bos, *self.tokenizer.encode(after + "\n")]
        return list(chain.from_iterable([i] * (self.image_tokens if i == image_id else 1) for i in ids))

    def _length(self, heads: list[list[int]], tails: list[list[int]], length: int | None) -> int:
        lengths = [len(head) + len(tail) for head, tail in zip(heads, tails)]
        longest = max(lengths)
        limit, name = (self.context, "the context") if length is None or length >= self.context else (length, "length")
        if longest > limit:
            images = heads[lengths.index(longest)].count(self.tokenizer.image_id)
            raise ValueError(
                f"prompt {lengths.index(longest)} makes {longest} tokens, {images} of them for images, but {name} is {limit}: "
                f"shorten the text, pass fewer images{' or a larger length' if name == 'length' else ''}"
            )
        return longest if length is None else length


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
    listed: list[Any] = list(texts) if isinstance(texts, list | tuple) else [texts]
    for n, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"{name} {n} is {type(text).__name__}, not a str: pass text, or a list of texts")
    if not listed:
        raise ValueError(f"no {name}: pass at least one (an empty text is fine)")
    return listed


def _place(images: ImageInputs, prompts: list[str]) -> tuple[list[ImageSource], list[str]]:
    """All images in order, and each prompt with one `<image>` for each of its own.

    transformers mends a batch in which only some prompts have `<image>` by writing bos into the others' words; here that is an error.
    """
    entries: list[Any] = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
    groups = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in entries]
    flat, given, wanted = list(chain(*groups)), [len(group) for group in groups], [prompt.count(IMAGE) for prompt in prompts]
    if not flat:
        raise ValueError("no image: PaliGemma reads at least one; pass a path, a PIL image or a uint8 array")
    if not any(wanted):
        if len(groups) != len(prompts):
            raise ValueError(f"images for {len(groups)} prompts, but {len(prompts)} prompts: pass one image, or one list of images, for each prompt")
        return flat, [IMAGE * n + prompt for n, prompt in zip(given, prompts)]
    if not all(wanted):
        raise ValueError(f"prompt {wanted.index(0)} has no {IMAGE} but another has: write it into every prompt or into none")
    nested = any(isinstance(entry, list | tuple) for entry in entries)
    if given != wanted if nested else len(flat) != sum(wanted):
        raise ValueError(f"{given if nested else len(flat)} images for {wanted} {IMAGE} in the prompts: pass as many images as {IMAGE}")
    return flat, prompts


def _pad(heads: list[list[int]], tails: list[list[int]], length: int, side: str, pad_id: int) -> dict[str, np.ndarray]:
    """Rows of head + tail as [B, length] arrays of Inputs, by name."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}: pass 'left' or 'right'")
    head, total = (np.array(n)[:, None] for n in ([len(h) for h in heads], [len(h) + len(t) for h, t in zip(heads, tails)]))
    place = np.arange(length) - (length - total if side == "left" else 0)  # [B, T], 0 at the first token of the row
    valid = (place >= 0) & (place < total)
    tokens = np.full(valid.shape, pad_id, np.int32)
    tokens[valid] = list(chain.from_iterable(h + t for h, t in zip(heads, tails)))
    return {"tokens": tokens, "valid": valid, "prefix": valid & (place < head), "targets": valid & (place >= head)}
