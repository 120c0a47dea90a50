"""Scenes: one to four handwritten digits on a random background.

Axes: B scenes, K digits of a scene from left to right, N samples along a glyph's side, H and W
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paligemma_jax.tiny.digits import Glyphs

SIZE = 112  # pixels along the side of a training scene
MAX_DIGITS = 4


@dataclass(frozen=True)
class Scenes:
    """Images and what is on them. Digits are in reading order, by the x-centres of their boxes."""

    images: np.ndarray  # uint8[B, H, W, 3]
    labels: np.ndarray  # int[B, K], -1 where a scene has fewer digits
    boxes: np.ndarray  # int[B, K, 4]: y0, x0, y1, x1 in pixels, tight around the ink
    glyphs: np.ndarray  # int[B, K]: index of the glyph
    masks: np.ndarray | None = None  # bool[B, K, H, W]: where the ink is
    codes: np.ndarray | None = None  # int[B, K, 16]: codes of the masks, if the glyphs have them

    def digits(self, index: int) -> list[int]:
        """The digits of one scene."""
        return [int(label) for label in self.labels[index] if label >= 0]


def compose(
    rng: np.random.Generator,
    source: Glyphs,
    batch: int,
    canvas: tuple[int, int] = (SIZE, SIZE),
    *,
    count: int | None = None,
    variety: float = 1.0,
    grid: int = 1,
) -> Scenes:
    """Compose random scenes.

    Args:
        rng: Random numbers.
        source: Digits to draw from.
        batch: Number of scenes.
        canvas: Height and width in pixels.
        count: Digits in every scene; by default 1 to 4 at random.
        variety: From 0 (black on white, digits of one height) to 1.
        grid: Round the corners of boxes down to multiples of this.
    """
    counts = np.full(batch, count) if count else rng.integers(1, MAX_DIGITS + 1, batch)
    chosen = rng.integers(len(source.labels), size=(batch, MAX_DIGITS))

    def vary(low: float, high: float | np.ndarray, plain: float) -> np.ndarray:
        return variety * rng.uniform(low, high, chosen.shape) + (1 - variety) * plain

    height = vary(0.22, 0.46 - 0.02 * counts[:, None], 0.36)
    width = height * np.clip(source.aspect[chosen] * vary(0.75, 1.25, 1), 0.3, 1.1)
    sizes = (np.stack([height, width], -1) * canvas).round().astype(int)
    boxes, placed = _place(rng, sizes, canvas, grid)
    placed &= np.arange(MAX_DIGITS) < counts[:, None]

    images, shade = _backgrounds(rng, batch, canvas, variety)
    contrast = vary(0.4, np.maximum(shade, 1 - shade)[:, None], 1)
    direction = np.where(shade < 0.5, 1, -1)[:, None]
    ink = (shade[:, None] + direction * contrast)[..., None]
    ink = ink + variety * rng.normal(0, 0.08, (*chosen.shape, 3))
    ink = np.clip(ink, 0, 1).astype(np.float32)
    alpha = _draw(source.alpha[chosen], boxes, canvas)
    alpha = alpha * placed[..., None, None].astype(np.float32)
    for k in range(MAX_DIGITS):
        images += alpha[:, k, ..., None] * (ink[:, k, None, None] - images)

    order = np.argsort(np.where(placed, boxes[..., 1] + boxes[..., 3], 10**6), axis=1)

    def sort(values: np.ndarray) -> np.ndarray:
        axes = tuple(range(2, values.ndim))
        return np.take_along_axis(values, np.expand_dims(order, axes), axis=1)

    chosen = sort(chosen)
    return Scenes(
        images=(np.clip(images, 0, 1) * 255).astype(np.uint8),
        labels=np.where(sort(placed), source.labels[chosen], -1),
        boxes=sort(boxes * placed[..., None]),
        glyphs=chosen,
        masks=sort(alpha > 0.5),
        codes=None if source.codes is None else source.codes[chosen],
    )


def _place(
    rng: np.random.Generator, sizes: np.ndarray, canvas: tuple[int, int], grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """Place boxes at random, one after the other, each with 40 tries.

    Boxes stay apart, and their x-centres differ by 4% of the width, so that the reading order is
    never in doubt.

    Args:
        rng: Random numbers.
        sizes: int[B, K, 2], height and width of each box.
        canvas: Height and width.
        grid: As in `compose`.

    Returns:
        Boxes int[B, K, 4], and placed bool[B, K].
    """
    batch, count, _ = sizes.shape
    boxes, placed = np.zeros((batch, count, 4), int), np.zeros((batch, count), bool)
    gap = np.array(canvas) * 0.02
    for k in range(count):
        free = np.array(canvas) - sizes[:, None, k] + 1
        corner = (rng.random((batch, 40, 2)) * free).astype(int) // grid * grid
        tries = np.concatenate([corner, corner + sizes[:, None, k]], -1)  # [B, 40, 4]
        a, b = tries[:, :, None], boxes[:, None, :k]
        apart = (a[..., :2] >= b[..., 2:] + gap) | (b[..., :2] >= a[..., 2:] + gap)
        ordered = np.abs(a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]) >= 0.08 * canvas[1]
        fits = (apart.any(-1) & ordered | ~placed[:, None, :k]).all(-1)
        boxes[:, k] = tries[np.arange(batch), fits.argmax(1)]
        placed[:, k] = np.any(fits, axis=1)
    return boxes, placed


def _draw(glyphs: np.ndarray, boxes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Glyphs float32[B, K, N, N], each resized into its box: float32[B, K, H, W]."""
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    samples = glyphs.shape[-1]
    rows = _resize_matrix(top, bottom - top, canvas[0], samples)
    columns = _resize_matrix(left, right - left, canvas[1], samples)
    return rows @ glyphs @ np.swapaxes(columns, -1, -2)


def _resize_matrix(start: np.ndarray, length: np.ndarray, pixels: int, samples: int) -> np.ndarray:
    """float32[..., pixels, samples]: resizes `samples` to the pixels start..start+length with a
    triangle filter; 0 at other pixels."""
    start, length = start[..., None].astype(np.float32), length[..., None].astype(np.float32)
    ratio = samples / length
    at = (np.arange(pixels, dtype=np.float32) + 0.5 - start) * ratio
    distance = np.abs(at[..., None] - np.arange(samples, dtype=np.float32) - 0.5)
    weights = np.maximum(0, 1 - distance / np.maximum(1, ratio)[..., None])
    inside = (at > 0) & (at < samples)
    return weights * (inside / np.maximum(weights.sum(-1), 1e-6))[..., None]


def _backgrounds(
    rng: np.random.Generator, batch: int, canvas: tuple[int, int], variety: float
) -> tuple[np.ndarray, np.ndarray]:
    """Backgrounds float32[B, H, W, 3] in 0..1, a shade with a gradient in any direction and noise;
    and the mean luminance of each, [B]."""
    shade = 1 - variety * rng.random((batch, 1))
    tint = variety * rng.normal(0, 0.06, (batch, 2, 3))
    ends = shade[:, None] + tint + variety * rng.normal(0, 0.08, (batch, 2, 1))
    ends = np.clip(ends, 0, 1).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, batch)[:, None, None]
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in canvas)
    slope = 0.5 + 0.7 * (np.sin(angle) * y[:, None] + np.cos(angle) * x).astype(np.float32)
    noise = rng.random((batch, *canvas), np.float32)
    noise = noise * rng.uniform(0, 0.15 * variety, (batch, 1, 1)).astype(np.float32)
    first, last = np.moveaxis(ends[:, :, None, None], 1, 0)
    images = first + (last - first) * slope[..., None] + noise[..., None]
    return images, ends.mean((1, 2))
