"""Thousands of prompts: sorted into length buckets, images opened in threads beside the device and encoded once, order kept."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from paligemma_jax.inference.generate import encode_images
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.image import pixel_values
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.mesh import mesh_of, padded_batch_size

AHEAD = 2  # batches whose images are opened before their turn

Run = Callable[[Inputs, Array, np.ndarray], tuple[np.ndarray, ...]]  # (inputs without images, features, which rows of all) -> arrays [B, ...]


def run_batches(model: PaliGemma, processor: Processor, rows: list[EncodedPrompt], run: Run, batch_size: int, progress: bool | None) -> Iterator[dict[int, Any]]:
    """What `run` finds, batch by batch: by number of row its part of each array, or its error if its image fails."""
    batches = _batches(rows, batch_size)
    shown = progress if progress is not None else len(batches) > 1 and sys.stderr.isatty()
    with ThreadPoolExecutor(4) as threads, tqdm(total=len(rows), disable=not shown, unit="prompt") as bar:
        images = ImageCache(model, processor.image_size, threads, Counter(key for row in rows for key in map(_key, row.images)))
        for number, batch in enumerate(batches):
            images.open([image for ahead in batches[number : number + 1 + AHEAD] for i in ahead for image in rows[i].images])
            yield dict(_run_batch(processor, rows, batch, images, run))
            bar.update(len(batch))


def _batches(rows: Sequence[EncodedPrompt], size: int) -> list[list[int]]:
    """Row numbers in batches of equal bucket and number of images, longest first so that memory runs out at once if it does."""
    kind = lambda i: (round_up(len(rows[i].prompt) + len(rows[i].suffix)), len(rows[i].images))
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=kind, reverse=True):
        if batches and len(batches[-1]) < size and kind(batches[-1][0]) == kind(i):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _run_batch(processor: Processor, rows: list[EncodedPrompt], batch: list[int], images: ImageCache, run: Run) -> Iterator[tuple[int, Any]]:
    failed = {i: error for i in batch for image in rows[i].images if (error := images.error(image))}
    yield from failed.items()
    if not (good := [i for i in batch if i not in failed]):
        return
    filled = np.array(good + [good[0]] * (images.room(len(good)) - len(good)))
    chosen = [rows[i] for i in filled]
    features = images.features([image for row in chosen for image in row.images])
    images.forget([image for i in batch for image in rows[i].images])
    length = min(round_up(max(len(row.prompt) + len(row.suffix) for row in chosen)), processor.context)
    nothing = np.zeros((0, processor.image_size, processor.image_size, 3), np.float32)
    features = features.reshape(len(chosen), -1, *features.shape[1:])  # a batch's rows have as many images each
    yield from zip(good, zip(*run(Inputs(images=nothing, **processor.pad(chosen, length=length)), features, filled)))


@dataclass
class ImageCache:
    """Opened images and their features, each kept from its first prompt to its last."""

    model: PaliGemma
    size: int
    threads: ThreadPoolExecutor
    waiting: Counter  # how many uses of an image are to come
    opened: dict[Any, Future] = field(default_factory=dict)
    encoded: dict[Any, Array] = field(default_factory=dict)

    def open(self, images: list[Any]) -> None:
        for image in images:
            if _key(image) not in self.opened:
                self.opened[_key(image)] = self.threads.submit(lambda image=image: pixel_values([image], self.size)[0])

    def error(self, image: Any) -> ValueError | None:
        error = self.opened[_key(image)].exception()
        if error is not None and not isinstance(error, ValueError):
            raise error
        return error

    def features(self, images: list[Any]) -> Array:
        """[M, P, D]; what is new is encoded in one go, filled up to its `room`."""
        keys = [_key(image) for image in images]
        if new := [key for key in dict.fromkeys(keys) if key not in self.encoded]:
            batch = np.stack([self.opened[key].result() for key in new])
            batch = np.concatenate([batch, np.zeros((self.room(len(new)) - len(new), *batch.shape[1:]), batch.dtype)])
            found = encode_images(self.model, jnp.asarray(batch))
            self.encoded |= zip(new, found if found.is_fully_addressable else to_host(found))  # of what lies in other processes there is no part to take
        return _stack([self.encoded[key] for key in keys])

    def padded_batch_size(self, n: int) -> int:
        """For as many rows or images."""
        return padded_batch_size(n, mesh_of(self.model))

    def forget(self, images: list[Any]) -> None:
        self.waiting.subtract(map(_key, images))
        for key in {_key(image) for image in images}:
            if self.waiting[key] <= 0:
                self.encoded.pop(key, None)
                self.opened.pop(key, None)


@jax.jit
def _stack(arrays: list[Array]) -> Array:
    return jnp.stack(arrays)


def _key(image: Any) -> Any:
    """Equal for what is surely the same image: a path by its name, an image in memory by its identity."""
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else id(image)
