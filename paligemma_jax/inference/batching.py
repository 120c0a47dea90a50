"""Run any number of prompts in batches of similar length, in any order.

Threads open images ahead of the device, and an image is encoded once for all of its prompts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.inference.generate import encode_images
from paligemma_jax.inference.sampling import is_integer
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.mesh import mesh_of, padded_batch_size

AHEAD = 2  # batches whose images are opened before their turn

# (inputs without images, features [B, n, P, D] if n > 0, prompt numbers int[B]) -> arrays [B, ...]
# or lists of B
RunBatch = Callable[[Inputs, Array | None, np.ndarray], tuple[Sequence[Any] | np.ndarray, ...]]
# The rows of one prompt in these arrays, or the error of its image.
BatchResult = tuple[Any, ...] | ValueError  # of the types that `run` returns


def run_batches(
    model: PaliGemma,
    processor: Processor,
    prompts: list[EncodedPrompt],
    run: RunBatch,
    batch_size: int,
    progress: bool | None,
    edits: Edits = NO_EDITS,
) -> Iterator[dict[int, BatchResult]]:
    """Run all prompts, batch by batch.

    Args:
        run: Computes a batch. Batches are padded to a `padded_batch_size`.
        batch_size: Maximum number of prompts in a batch.
        progress: Whether to report progress; by default for several batches on a terminal.
        edits: Changes of the image encoder's stages.

    Yields:
        The results of a batch by prompt number.
    """
    check_batch_size(model, "batch_size", batch_size)
    batches = _batches(prompts, batch_size)
    if progress is None:
        progress = len(batches) > 1 and sys.stderr.isatty()
    uses = Counter(_key(image) for prompt in prompts for image in prompt.images)
    bar = progress_bar(total=len(prompts), unit="prompt", show=progress)
    with ThreadPoolExecutor(4) as threads, bar:
        images = ImageCache(model, processor, threads, uses, edits)
        for number, batch in enumerate(batches):
            for ahead in batches[number : number + 1 + AHEAD]:
                images.open([image for i in ahead for image in prompts[i].images])
            yield _run_batch(processor, prompts, batch, images, run)
            bar.update(len(batch))


def check_batch_size(model: PaliGemma, name: str, size: int) -> None:
    """Raise ValueError if prompts cannot be answered in batches of the size that the argument
    `name` has."""
    if not is_integer(size) or size < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
    if model.soft_prompt is not None and model.soft_prompt.ndim == 3:
        raise ValueError(
            "vectors for each row require Inputs, whose rows keep their order: pass the result of "
            "the processor"
        )


def pad_batch(processor: Processor, prompts: Sequence[EncodedPrompt]) -> Inputs:
    """The inputs of a batch without its images, padded to a bucket of lengths."""
    length = min(round_up(processor.padded_length(prompts)), processor.context)
    return Inputs(images=None, **processor.pad(prompts, length=length))


def _batches(prompts: Sequence[EncodedPrompt], size: int) -> list[list[int]]:
    """Prompt numbers in batches of one length bucket and number of images.

    The longest come first, so that running out of memory happens at once or never.
    """

    def kind(i: int) -> tuple[int, int]:
        tokens = len(prompts[i])
        return round_up(tokens), len(prompts[i].images)

    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=kind, reverse=True):
        if batches and len(batches[-1]) < size and kind(batches[-1][0]) == kind(i):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _run_batch(
    processor: Processor,
    prompts: list[EncodedPrompt],
    batch: list[int],
    images: ImageCache,
    run: RunBatch,
) -> dict[int, BatchResult]:
    results: dict[int, BatchResult] = {}
    for i in batch:
        for image in prompts[i].images:
            error = images.error(image)
            if error is not None:
                results[i] = error
    readable = [i for i in batch if i not in results]
    if not readable:
        return results
    missing = images.padded_batch_size(len(readable)) - len(readable)
    numbers = np.array(readable + [readable[0]] * missing)
    chosen = [prompts[i] for i in numbers]
    used = [image for prompt in chosen for image in prompt.images]
    features = None
    if used:  # all prompts of a batch have the same number of images
        features = images.features(used)
        features = features.reshape(len(chosen), -1, *features.shape[1:])
    images.release([image for i in batch for image in prompts[i].images])
    arrays = run(pad_batch(processor, chosen), features, numbers)
    # `arrays` also contains the padding rows.
    results.update(zip(readable, zip(*arrays, strict=True), strict=False))
    return results


@dataclass
class ImageCache:
    """Opened images and their features, each kept from its first prompt to its last.

    Features of encoded images (bytes) stay for longer: those of the `kept` ones that were used
    last.
    """

    model: PaliGemma
    processor: Processor
    threads: ThreadPoolExecutor
    uses: Counter[Hashable]  # number of remaining uses of each image
    edits: Edits = NO_EDITS
    kept: int = 0
    opened: dict[Hashable, Future[np.ndarray]] = field(default_factory=dict)
    encoded: dict[Hashable, Array | np.ndarray] = field(default_factory=dict)
    # By identity, with the image itself, so that no other object gets its id.
    keys: dict[int, tuple[ImageSource, Hashable]] = field(default_factory=dict)

    def add(self, images: Iterable[ImageSource]) -> None:
        """Announce one use of each image."""
        self.uses.update(map(self._key, images))

    def open(self, images: Iterable[ImageSource]) -> None:
        """Start to open images in the background."""
        for image in images:
            key = self._key(image)
            if key not in self.opened and key not in self.encoded:
                self.opened[key] = self.threads.submit(self.processor.pixel_values, [image])

    def error(self, image: ImageSource) -> ValueError | None:
        """The error of an image that cannot be read, or None."""
        if self._key(image) in self.encoded:
            return None
        error = self.opened[self._key(image)].exception()
        if error is not None and not isinstance(error, ValueError):
            raise error
        return error

    def features(self, images: list[ImageSource]) -> Float[Array, "M P D"]:
        """The features of opened images. New ones are encoded together."""
        self.encode(images)
        return _stack([self.encoded[self._key(image)] for image in images])

    def is_encoded(self, image: ImageSource) -> bool:
        return self._key(image) in self.encoded

    def encode(self, images: Iterable[ImageSource]) -> None:
        """Encode those of the opened images that are not encoded yet, in a padded batch."""
        new = [key for key in dict.fromkeys(map(self._key, images)) if key not in self.encoded]
        if not new:
            return
        pixels = np.concatenate([self.opened[key].result() for key in new])
        missing = self.padded_batch_size(len(new)) - len(new)
        padding = np.zeros((missing, *pixels.shape[1:]), pixels.dtype)
        pixels = jnp.asarray(np.concatenate([pixels, padding]))
        features = encode_images(self.model, pixels, self.edits)
        if not features.is_fully_addressable:  # parts on other processes cannot be sliced
            features = to_host(features)
        self.encoded |= zip(new, features, strict=False)  # without the padding

    def padded_batch_size(self, size: int) -> int:
        """The size that a batch of images or prompts is padded to."""
        return padded_batch_size(size, mesh_of(self.model))

    def release(self, images: Sequence[ImageSource]) -> None:
        """Count one use of each image, and drop the images without further uses."""
        keys = [self._key(image) for image in images]
        self.uses.subtract(keys)
        for image in images:
            self.keys.pop(id(image), None)
        for key in dict.fromkeys(keys):
            if key in self.encoded:  # becomes the last one used
                self.encoded[key] = self.encoded.pop(key)
            if self.uses[key] <= 0:
                del self.uses[key]
                self.opened.pop(key, None)
        idle = [key for key in self.encoded if key not in self.uses]
        files = [key for key in idle if isinstance(key, bytes)]  # the last one used is last
        kept = files[max(len(files) - self.kept, 0) :]
        for key in set(idle) - set(kept):
            del self.encoded[key]

    def _key(self, image: ImageSource) -> Hashable:
        """`_key`, computed once for an image between two releases: digests take time."""
        if id(image) not in self.keys:
            self.keys[id(image)] = image, _key(image)
        return self.keys[id(image)][1]


@jax.jit
def _stack(arrays: list[Array]) -> Array:
    return jnp.stack(arrays)


def _key(image: ImageSource) -> Hashable:
    """A key that is equal for the same image: its path, a digest of its bytes, or the identity of
    the object."""
    if isinstance(image, bytes):
        return blake2b(image, digest_size=16).digest()
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else id(image)
