"""A data set to detect objects in: rendered shapes, annotated as in COCO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

from paligemma_jax.processing.locations import Box

LABELS = ("circle", "square", "triangle", "star")
WIDTH, HEIGHT = 240, 180
MAX_SHAPES = 4
SIZES = 0.2, 0.45  # of a shape, in heights of the image
OVERLAP = 0.1  # largest part of a box that another one may cover
CONTRAST = 0.25  # least difference in luminance of shape and background, from 0 to 1
LUMINANCE = 0.299, 0.587, 0.114  # of red, green and blue
SCALE = 3  # shapes are drawn larger by this factor, so that their edges are smooth


@dataclass(frozen=True)
class Shape:
    """A shape on an image. Its outline has one vertex per row: x, y in pixels."""

    label: str
    outline: np.ndarray  # float[N, 2]

    @property
    def box(self) -> Box:
        """The smallest box around the outline: left, top, right, bottom in pixels."""
        (left, top), (right, bottom) = self.outline.min(0), self.outline.max(0)
        return float(left), float(top), float(right), float(bottom)


def write_shapes(output: str, rows: int = 600, seed: int = 0) -> Path:
    """Write images of circles, squares, triangles and stars, and instances.json as in COCO.

    An image has one to four shapes of random color, size, position and rotation, on a background
    with noise. Shapes overlap little. The same seed gives the same images, and more rows only add
    to them.

    Example: python -m paligemma_jax.tiny.shapes --output shapes --rows 600 --seed 0

    Args:
        output: Directory to write to.
        rows: Number of images.
        seed: Seed of the images.
    """
    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    folder = Path(output)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for i in range(rows):
        picture, shapes = draw_scene(np.random.default_rng([seed, i]))
        name = f"images/{i:05}.jpg"
        picture.save(folder / name, quality=90)
        images.append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for shape in shapes:
            annotations.append(_annotation(len(annotations), i, shape))
    categories = [{"id": i, "name": label} for i, label in enumerate(LABELS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def _annotation(number: int, image: int, shape: Shape) -> dict:
    left, top, right, bottom = (round(value, 2) for value in shape.box)
    width, height = round(right - left, 2), round(bottom - top, 2)
    return {
        "id": number,
        "image_id": image,
        "category_id": LABELS.index(shape.label),
        "bbox": [left, top, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
    }


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, list[Shape]]:
    """Draw an image with one to four shapes. Returns it and the shapes, from left to right."""
    background = rng.uniform(0, 1, 3)
    large = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
    mask = Image.new("L", large.size)
    shapes: list[Shape] = []
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        shape = _place(rng, shapes)
        if shape is not None:
            shapes.append(shape)
            vertices = [tuple(vertex) for vertex in shape.outline * SCALE]
            color = tuple((_color(rng, background) * 255).round().astype(int).tolist())
            ImageDraw.Draw(large).polygon(vertices, fill=color)
            ImageDraw.Draw(mask).polygon(vertices, fill=255)
    size = WIDTH, HEIGHT
    painted, alpha = (np.asarray(x.resize(size, Image.Resampling.BOX)) / 255 for x in (large, mask))
    pixels = painted + (1 - alpha[..., None]) * _background(rng, background)
    pixels += rng.normal(0, rng.uniform(0.01, 0.06), pixels.shape)
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return picture, sorted(shapes, key=lambda shape: shape.box[0])


def _place(rng: np.random.Generator, others: list[Shape]) -> Shape | None:
    """A shape at a random place that others leave free; None if 40 tries find none."""
    label = LABELS[rng.integers(len(LABELS))]
    outline = _outline(label, rng.uniform(0, 2 * np.pi)) * rng.uniform(*SIZES) * HEIGHT / 2
    low, high = 1 - outline.min(0), (WIDTH - 1, HEIGHT - 1) - outline.max(0)
    for _ in range(40):
        shape = Shape(label, outline + rng.uniform(low, high))
        if all(_covered(shape.box, other.box) <= OVERLAP for other in others):
            return shape
    return None


def _outline(label: str, angle: float) -> np.ndarray:
    """The outline of a shape around 0, on or in the unit circle."""
    count, inner = {"circle": (60, 1.0), "square": (4, 1.0), "triangle": (3, 1.0)}.get(
        label, (10, 0.45)
    )
    angles = angle + np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2 == 0, 1, inner)
    return np.stack([np.cos(angles), np.sin(angles)], -1) * radius[:, None]


def _covered(a: Box, b: Box) -> float:
    """The intersection of two boxes as a fraction of the smaller one."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return sides[0] * sides[1] / min(areas)


def _color(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random color that is lighter or darker than the background."""
    while True:
        color = rng.uniform(0, 1, 3)
        if abs(np.dot(color - background, LUMINANCE)) >= CONTRAST:
            return color


def _background(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """float[H, W, 3]: the color with a gradient in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.linspace(-0.5, 0.5, WIDTH), np.linspace(-0.5, 0.5, HEIGHT)[:, None]
    slope = np.cos(angle) * x + np.sin(angle) * y
    return color + rng.uniform(0, 0.25) * slope[..., None]


def main() -> None:
    print(tyro.cli(write_shapes, prog="python -m paligemma_jax.tiny.shapes"))


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
