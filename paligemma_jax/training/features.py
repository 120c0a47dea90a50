"""What a frozen image encoder makes of every image, kept on disk: it runs once an image, not once an epoch, nor once a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.tensor import DTYPES
from paligemma_jax.data.rows import RowSource, example_at
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.image import pixel_values
from paligemma_jax.sharding import hosts
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit


class Features:
    """[P, W] for each image file, in DIR/ENCODER/IMAGE.npy: named by what the encoder's weights and the file contain, so nothing is ever mistaken."""

    def __init__(self, directory: Path, model: PaliGemma, size: int):
        weights = parameters(model)
        digest = hashlib.sha256(f"{model.config.vision} {model.config.activation_dtype}".encode())
        for path in sorted(path for path in weights if path.startswith("vision/")):
            digest.update(np.ascontiguousarray(to_host(weights[path])).view(np.uint8).data)
        self.folder, self.size, self.dtype = directory / digest.hexdigest()[:16], size, DTYPES[model.config.activation_dtype]
        self.folder.mkdir(parents=True, exist_ok=True)

    def place(self, image: Any) -> Path:
        if not isinstance(image, str | Path):
            raise ValueError("--features keeps what is made of image files: these rows have images of another kind")
        return self.folder / f"{hashlib.sha256(Path(image).read_bytes()).hexdigest()[:32]}.npy"

    def __call__(self, images: list[Any]) -> np.ndarray:
        """[M, P, W] of what `fill` has seen."""
        return np.stack([np.load(self.place(image)) for image in images]).view(self.dtype)

    def fill(self, model: PaliGemma, sources: list[RowSource], batch: int) -> None:
        """Encodes the images of all rows that are not there yet, `batch` at a time."""
        missing = {self.place(image): image for image in _images(sources)}
        missing = {place: image for place, image in missing.items() if not place.exists()}
        hosts.barrier("features missing")  # before the first of them is written
        encode = mesh_jit(lambda model, images: model.vision(images.astype(model.config.activation_dtype)))
        places = list(missing)
        for start in tqdm(range(0, len(places), batch), "features", unit="batch", disable=None, leave=False):
            group = places[start : start + batch]
            filled = [missing[place] for place in group] + [missing[group[0]]] * (batch - len(group))
            found = to_host(encode(model, pixel_values(filled, self.size)))
            for place, array in zip(group, found) if hosts.is_first_process() else ():
                new = place.with_suffix(f".{os.getpid()}.tmp")
                with new.open("wb") as file:
                    np.save(file, array.view(np.uint16) if array.dtype.itemsize == 2 else array)
                os.replace(new, place)
        hosts.barrier("features")


def _images(sources: list[RowSource]) -> Iterator[Any]:
    for source in sources:
        for i in range(len(source)):
            yield from example_at(source, i).images
