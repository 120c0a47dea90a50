"""Random image augmentation. Boxes in the text are adjusted to the image."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from paligemma_jax.data.rows import Example
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.locations import BOX, LAST_BIN, location_tokens

SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Augment:
    """Random mirroring, cropping and color changes.

    Rows with `<seg>` masks keep their geometry. Rows with several images or with boxes in the
    prompt are not cropped, nor are rows that would lose all of their boxes.
    """

    flip: float = 0.0  # probability of mirroring
    crop: float = 1.0  # smallest fraction of each side to keep
    color: float = 0.0  # largest change of brightness, contrast and saturation
    on_white: bool = True  # composite transparency on white (`load_image`)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Load the images of an example and augment them. Deterministic in the state of `rng`."""
        images = [load_image(image, self.on_white) for image in example.images]
        prefix, suffix = example.prefix, example.suffix
        mirror, window = rng.random() < self.flip, self._window(rng)
        factors = 1 + self.color * rng.uniform(-1, 1, 3)
        if self.color:
            for enhancer, factor in zip(ENHANCERS, factors, strict=True):
                images = [enhancer(image).enhance(factor) for image in images]
        if "<seg" in prefix + suffix:
            return replace(example, images=tuple(images))
        if mirror and not SIDES.search(prefix + suffix):
            images = [ImageOps.mirror(image) for image in images]
            prefix, suffix = (move_boxes(text, mirror_box) for text in (prefix, suffix))
        if self.crop < 1 and len(images) == 1 and not BOX.search(prefix):
            cropped = move_boxes(suffix, lambda box: crop_box(box, window))
            if cropped or not suffix:
                images, suffix = [_crop_image(images[0], window)], cropped
        return replace(example, images=tuple(images), prefix=prefix, suffix=suffix)

    def _window(self, rng: np.random.Generator) -> np.ndarray:
        """A random window to crop to: y0, x0, y1, x1 as fractions of the sides."""
        sides = rng.uniform(self.crop, 1, 2)
        start = rng.uniform(0, 1, 2) * (1 - sides)
        return np.concatenate([start, start + sides])


def move_boxes(text: str, move: Callable[[np.ndarray], np.ndarray | None]) -> str:
    """Apply `move` to every box of a text (y0, x0, y1, x1 in location bins). If it returns None,
    the box is dropped together with its label, up to the next semicolon."""
    if not BOX.search(text):
        return text
    result, pieces = "", re.split(r"(\s*;\s*)", text)
    for separator, part in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        boxes = [move(np.array(re.findall(r"\d{4}", box), float)) for box in BOX.findall(part)]
        tokens = iter([location_tokens(box) for box in boxes if box is not None])
        if any(box is None for box in boxes):
            continue
        moved = BOX.sub(lambda _, tokens=tokens: next(tokens), part)
        result += (separator if result else "") + moved
    return result


def mirror_box(box: np.ndarray) -> np.ndarray:
    y0, x0, y1, x1 = box
    return np.array([y0, LAST_BIN - x1, y1, LAST_BIN - x0])


def crop_box(box: np.ndarray, window: np.ndarray) -> np.ndarray | None:
    """A box in the coordinates of a window, clipped; None if less than a third of it is visible."""
    start, size = np.tile(window[:2], 2), np.tile(window[2:] - window[:2], 2)
    visible = np.clip((box / LAST_BIN - start) / size, 0, 1) * LAST_BIN
    area = _area(visible) * size[0] * size[1]
    return visible if area > 0 and area * 3 >= _area(box) else None


def _crop_image(image: Image.Image, window: np.ndarray) -> Image.Image:
    edges = window[[1, 0, 3, 2]] * np.array(image.size * 2)
    return image.crop(tuple(edges.round().astype(int)))


def _area(box: np.ndarray) -> float:
    y0, x0, y1, x1 = box
    return max(y1 - y0, 0) * max(x1 - x0, 0)
