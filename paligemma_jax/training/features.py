"""A cache of image encoder outputs on disk: a frozen encoder runs once per image, not per epoch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax import Array

from convert.tensor import DTYPES
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.data.rows import RowSource, example_at
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import Processor
from paligemma_jax.sharding import hosts
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit


class FeatureCache:
    """Features [P, W] of image files, in DIRECTORY/ENCODER/IMAGE.npy.

    Both names are hashes, of the encoder's weights with the image settings and of the file, so that
    entries never go stale.
    """

    def __init__(self, directory: Path, model: PaliGemma, processor: Processor):
        weights = parameters(model)
        dtype = model.config.activation_dtype
        digest = hashlib.sha256(
            f"{model.config.vision} {dtype} {processor.image_settings}".encode()
        )
        for path in sorted(path for path in weights if path.startswith("vision/")):
            digest.update(np.ascontiguousarray(to_host(weights[path])).view(np.uint8).data)
        self.folder = directory / digest.hexdigest()[:16]
        self.processor, self.dtype = processor, DTYPES[dtype]
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, image: ImageSource) -> Path:
        if not isinstance(image, str | Path):
            raise ValueError(
                f"--features requires images that are files, got a {type(image).__name__}"
            )
        return self.folder / f"{hashlib.sha256(Path(image).read_bytes()).hexdigest()[:32]}.npy"

    def __call__(self, images: list[ImageSource]) -> np.ndarray:
        """Read features [M, P, W] that `fill` has cached."""
        return np.stack([np.load(self.file(image)) for image in images]).view(self.dtype)

    def fill(self, model: PaliGemma, sources: list[RowSource], batch_size: int) -> None:
        """Encode all images of the rows that are not cached yet."""
        images = {self.file(image): image for image in _images(sources)}
        missing = [file for file in images if not file.exists()]
        hosts.barrier("features missing")  # before any process writes one

        @mesh_jit
        def encode(model: PaliGemma, pixels: Array) -> Array:
            return model.vision(pixels.astype(model.config.activation_dtype))

        with progress_bar(total=len(missing), desc="features", unit="image", leave=False) as bar:
            for start in range(0, len(missing), batch_size):
                files = missing[start : start + batch_size]
                padded = [*files, *files[:1] * (batch_size - len(files))]
                pixels = self.processor.pixel_values([images[file] for file in padded])
                features = to_host(encode(model, pixels))  # type: ignore[arg-type]
                if hosts.is_first_process():
                    for file, array in zip(files, features, strict=False):
                        _save(file, array)
                bar.update(len(files))
        hosts.barrier("features")


def _images(sources: list[RowSource]) -> Iterator[ImageSource]:
    for source in sources:
        for i in range(len(source)):
            yield from example_at(source, i).images


def _save(file: Path, array: np.ndarray) -> None:
    """Write an array atomically. .npy files do not support bfloat16."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array.view(np.uint16) if array.dtype.itemsize == 2 else array)
    os.replace(temporary, file)
