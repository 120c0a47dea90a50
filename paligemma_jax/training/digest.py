"""Whether a run that resumes has the data that it was started with, wherever that is now."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from paligemma_jax.data.rows import RowSource, example_at
from paligemma_jax.processing.image import ImageSource, load_image


def rows_digest(rows: RowSource) -> str:
    """A digest of texts, weights, order and images: of a file by name and size, else by pixels.

    Of a source that is no list, such as one of grain, only the number of rows and the first row
    are digested, because an access may be slow.
    """
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(len(rows) if isinstance(rows, list) else min(len(rows), 1)):
        example = example_at(rows, i)
        images = [_image_key(image) for image in example.images]
        row = [images, example.prefix, example.suffix, example.weight]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _image_key(image: ImageSource) -> object:
    if isinstance(image, str | os.PathLike):
        file = Path(image)
        return [file.name, file.stat().st_size if file.is_file() else None]
    opened = load_image(image)
    return [opened.size, hashlib.sha256(opened.tobytes()).hexdigest()]
