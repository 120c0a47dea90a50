"""Random changes of a picture that keep what is said about it true: boxes go along, and nothing is mirrored that speaks of left or right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from paligemma_jax.data.rows import Example
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.locations import BOX, LAST_BIN, location_tokens

SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class Augment:
    """Random mirroring, cropping and colours.

    Pictures whose rows have `<seg>` masks keep their geometry, and so do those cropped of all their boxes; several pictures of a row are not cropped.
    """

    flip: float = 0.0  # the chance of being mirrored
    crop: float = 1.0  # the smallest part of each side that is kept
    color: float = 0.0  # the largest change of brightness, contrast and saturation

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example with its images opened and changed; a function of its arguments and the state of `rng`."""
        images, suffix, prefix = [load_image(image) for image in example.images], example.suffix, example.prefix
        mirrored, window = rng.random() < self.flip, self._window(rng)
        colors = 1 + self.color * rng.uniform(-1, 1, 3)
        if self.color:
            for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), colors):
                images = [enhance(image).enhance(factor) for image in images]
        still = "<seg" in prefix + suffix
        if mirrored and not still and not SIDES.search(prefix + suffix):
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
            prefix, suffix = (moved(text, lambda box: box[[0, 3, 2, 1]] * [1, -1, 1, -1] + [0, LAST_BIN, 0, LAST_BIN]) for text in (prefix, suffix))
        if self.crop < 1 and not still and len(images) == 1 and not BOX.search(prefix):
            cut = moved(suffix, lambda box: inside(box, window))
            if cut or not suffix:
                suffix, size = cut, np.array(images[0].size * 2)
                images = [images[0].crop(tuple((window[[1, 0, 3, 2]] * size).round().astype(int)))]
        return replace(example, images=tuple(images), prefix=prefix, suffix=suffix)

    def _window(self, rng: np.random.Generator) -> np.ndarray:
        """y0, x0, y1, x1 in parts of the sides."""
        sides = rng.uniform(self.crop, 1, 2)
        start = rng.uniform(0, 1, 2) * (1 - sides)
        return np.concatenate([start, start + sides])


def moved(text: str, move: Callable[[np.ndarray], np.ndarray | None]) -> str:
    """`text` with every box (y0, x0, y1, x1 in bins) where `move` puts it; None drops it, and what is said of it up to the next ;"""
    if not BOX.search(text):
        return text
    kept, pieces = "", re.split(r"(\s*;\s*)", text)
    for gap, part in zip(["", *pieces[1::2]], pieces[::2]):
        boxes = [move(np.array(re.findall(r"\d{4}", box), float)) for box in BOX.findall(part)]
        places = iter([location_tokens(box) for box in boxes if box is not None])
        if all(box is not None for box in boxes):
            kept += (gap if kept else "") + BOX.sub(lambda _, places=places: next(places), part)
    return kept


def inside(box: np.ndarray, window: np.ndarray) -> np.ndarray | None:
    """The box as the window shows it; None if less than a third of it can be seen."""
    start, size = np.tile(window[:2], 2), np.tile(window[2:] - window[:2], 2)
    seen = np.clip((box / LAST_BIN - start) / size, 0, 1) * LAST_BIN
    area = lambda b: max(b[2] - b[0], 0) * max(b[3] - b[1], 0)
    return seen if area(seen) * size[0] * size[1] * 3 >= area(box) and area(seen) > 0 else None
