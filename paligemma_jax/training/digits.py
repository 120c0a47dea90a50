"""Pictures of real handwritten digits, with questions and answers about them: what the embedded checkpoint is trained and judged on.

The digits are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, UCI "Optical recognition of handwritten digits"). They are divided
into training and held-out digits before anything is composed, so no scan is ever on both sides. Axes: B scenes, K digits of a scene
(left to right), G glyphs, N samples along a glyph's side, H and W pixels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIZE = 112  # pixels along the side of a training canvas
HELD_OUT = 300  # scans that training never sees
MAX_DIGITS = 4
GLYPH = 32  # samples along a glyph's side
NUMBERS = ("no", "one", "two", "three", "four")
PROMPTS = {"caption": "caption en", "ocr": "ocr", "count": "answer en how many digits?", "detect": "detect {}"}
LOCATED = re.compile(r"<loc(\d{4})>" * 4 + r" (\d)")


@dataclass(frozen=True)
class Glyphs:
    """Digits cut out along their ink and stretched to a square."""

    alpha: np.ndarray  # float32[G, N, N], 1 where ink is
    aspect: np.ndarray  # float32[G], width / height before stretching
    labels: np.ndarray  # int[G]


@dataclass(frozen=True)
class Scenes:
    """Composed pictures and what is on them. Digits are in reading order: by the x-centre of their box."""

    images: np.ndarray  # uint8[B, H, W, 3]
    labels: np.ndarray  # int[B, K], -1 where a scene has fewer digits
    boxes: np.ndarray  # int[B, K, 4]: y0, x0, y1, x1 in pixels, the tight box of the ink
    glyphs: np.ndarray  # int[B, K]: which glyph of the source

    def digits(self, index: int) -> list[int]:
        return [int(label) for label in self.labels[index] if label >= 0]


@functools.cache
def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scans of one side of the fixed split: float[G, 8, 8] in 0..1 and their digits int[G]."""
    from sklearn.datasets import load_digits  # only training needs scikit-learn

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = np.sort(order[:HELD_OUT] if held_out else order[HELD_OUT:])
    return data.images[chosen] / 16, data.target[chosen]


def _cut(scan: np.ndarray, rng: np.random.Generator | None, size: int, gain: float) -> tuple[np.ndarray, float]:
    """One scan, enlarged smoothly (bent at random if `rng` is given) and cut along its ink: float32[size, size], width / height."""
    side, threshold = 12 * 8, 0.5
    if rng is not None:
        scan = scan + rng.normal(0, 0.05, scan.shape)
        threshold, gain = rng.uniform(0.35, 0.6), rng.uniform(1.2, 3)
    image = Image.fromarray(np.pad(scan, 2).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    if rng is not None:
        corners = np.array([0, 0, 0, side, side, side, side, 0]) + rng.normal(0, 0.06 * side, 8)
        image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR).transform(
            (side, side), Image.Transform.QUAD, corners.tolist(), Image.Resampling.BILINEAR
        )
    alpha = np.clip((np.asarray(image) - threshold) * gain + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((alpha > 0.2).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    glyph = Image.fromarray(alpha[top:bottom, left:right]).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(glyph), (right - left) / (bottom - top)


@functools.cache
def glyphs(held_out: bool, copies: int = 0, size: int = GLYPH, gain: float = 1.6) -> Glyphs:
    """All scans of one side as glyphs, with a contrast of `gain`; or `copies` randomly bent copies of each (the same in every process)."""
    images, labels = scans(held_out)
    rng = np.random.default_rng(1) if copies else None
    cut = [_cut(scan, rng, size, gain) for _ in range(max(copies, 1)) for scan in images]
    alpha, aspect = zip(*cut)
    return Glyphs(np.stack(alpha), np.array(aspect, np.float32), np.tile(labels, max(copies, 1)))


def _place(rng: np.random.Generator, sizes: np.ndarray, canvas: tuple[int, int], grid: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Throws boxes of `sizes` (int[B, K, 2]: height, width) on the canvas, one after the other.

    Boxes stay apart, and their x-centres differ by 4% of the width, so that the reading order is never in doubt. Each box has 40 tries.
    Returns boxes int[B, K, 4] and placed bool[B, K].
    """
    batch, count, _ = sizes.shape
    boxes, placed = np.zeros((batch, count, 4), int), np.zeros((batch, count), bool)
    gap = np.array(canvas) * 0.02
    for k in range(count):
        corner = (rng.random((batch, 40, 2)) * (np.array(canvas) - sizes[:, None, k] + 1)).astype(int) // grid * grid
        tries = np.concatenate([corner, corner + sizes[:, None, k]], -1)  # [B, 40, 4]
        a, b = tries[:, :, None], boxes[:, None, :k]
        apart = ((a[..., :2] >= b[..., 2:] + gap) | (b[..., :2] >= a[..., 2:] + gap)).any(-1)
        ordered = np.abs(a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]) >= 0.08 * canvas[1]
        fits = (apart & ordered | ~placed[:, None, :k]).all(-1)
        boxes[:, k] = tries[np.arange(batch), fits.argmax(1)]
        placed[:, k] = np.any(fits, axis=1)
    return boxes, placed


def _stretch(start: np.ndarray, length: np.ndarray, pixels: int, samples: int) -> np.ndarray:
    """float32[..., pixels, samples]: the matrix that lays `samples` over the pixels start..start+length (triangle filter) and 0 elsewhere."""
    start, length = start[..., None].astype(np.float32), length[..., None].astype(np.float32)
    ratio = samples / length
    at = (np.arange(pixels, dtype=np.float32) + 0.5 - start) * ratio
    weights = np.maximum(0, 1 - np.abs(at[..., None] - np.arange(samples, dtype=np.float32) - 0.5) / np.maximum(1, ratio)[..., None])
    inside = (at > 0) & (at < samples)
    return weights * (inside / np.maximum(weights.sum(-1), 1e-6))[..., None]


def _paper(rng: np.random.Generator, batch: int, canvas: tuple[int, int], variety: float) -> tuple[np.ndarray, np.ndarray]:
    """Backgrounds float32[B, H, W, 3] in 0..1: a shade, a gradient in any direction, noise; and the mean luminance of each, [B]."""
    shade = 1 - variety * rng.random((batch, 1))
    tint = variety * rng.normal(0, 0.06, (batch, 2, 3))
    ends = np.clip(shade[:, None] + tint + variety * rng.normal(0, 0.08, (batch, 2, 1)), 0, 1).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, batch)
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in canvas)
    slope = 0.5 + 0.7 * (np.sin(angle)[:, None, None] * y[:, None] + np.cos(angle)[:, None, None] * x).astype(np.float32)
    grain = rng.random((batch, *canvas), np.float32) * rng.uniform(0, 0.15 * variety, (batch, 1, 1)).astype(np.float32)
    paper = ends[:, 0, None, None] + (ends[:, 1] - ends[:, 0])[:, None, None] * slope[..., None] + grain[..., None]
    return paper, ends.mean((1, 2))


def compose(
    rng: np.random.Generator, source: Glyphs, batch: int, canvas: tuple[int, int] = (SIZE, SIZE), *,
    count: int | None = None, variety: float = 1.0, grid: int = 1,
) -> Scenes:  # fmt: skip
    """Lays 1 to 4 digits (or `count`) of `source` on each of `batch` backgrounds of `canvas` = (height, width) pixels.

    For a learner's first steps, `variety` 0 makes all digits black on white and of one height, and `grid` rounds their corners to a multiple.
    """
    wanted = np.full(batch, count) if count else rng.integers(1, MAX_DIGITS + 1, batch)
    chosen = rng.integers(len(source.labels), size=(batch, MAX_DIGITS))
    blend = lambda low, high, easy: variety * rng.uniform(low, high, chosen.shape) + (1 - variety) * easy
    height = blend(0.22, 0.46 - 0.02 * wanted[:, None], 0.36)
    width = height * np.clip(source.aspect[chosen] * blend(0.75, 1.25, 1), 0.3, 1.1)
    boxes, placed = _place(rng, (np.stack([height, width], -1) * canvas).round().astype(int), canvas, grid)
    placed &= np.arange(MAX_DIGITS) < wanted[:, None]

    images, shade = _paper(rng, batch, canvas, variety)
    contrast = blend(0.4, np.maximum(shade, 1 - shade)[:, None], 1)
    ink = (shade[:, None] + np.where(shade < 0.5, 1, -1)[:, None] * contrast)[..., None] + variety * rng.normal(0, 0.08, (*chosen.shape, 3))
    ink = np.clip(ink, 0, 1).astype(np.float32)
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    samples = source.alpha.shape[-1]
    rows, columns = _stretch(top, bottom - top, canvas[0], samples), _stretch(left, right - left, canvas[1], samples)
    alpha = rows @ source.alpha[chosen] @ np.swapaxes(columns, -1, -2) * placed[..., None, None].astype(np.float32)  # [B, K, H, W]
    for k in range(MAX_DIGITS):
        images += alpha[:, k, ..., None] * (ink[:, k, None, None] - images)

    order = np.argsort(np.where(placed, left + right, 10**6), axis=1)
    labels = np.take_along_axis(np.where(placed, source.labels[chosen], -1), order, 1)
    chosen = np.take_along_axis(chosen, order, 1)
    boxes = np.take_along_axis(boxes * placed[..., None], order[..., None], 1)
    return Scenes((np.clip(images, 0, 1) * 255).astype(np.uint8), labels, boxes, chosen)


def ask(scenes: Scenes, index: int, task: str, digit: int | None = None) -> tuple[str, str]:
    """(prompt, answer) of a task of `PROMPTS` about one scene; `digit` is the one to detect (none there: the answer is empty)."""
    digits = scenes.digits(index)
    names = [str(d) for d in digits]
    if task == "caption":
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        answer = f"{NUMBERS[len(names)]} digit{'s' * (len(names) > 1)}: {listed}"
    elif task == "detect":
        canvas = scenes.images.shape[1:3]
        answer = " ; ".join(f"{locations(box, canvas)} {d}" for box, d in zip(scenes.boxes[index], digits) if d == digit)
    else:
        answer = {"ocr": " ".join(names), "count": str(len(names))}[task]
    return PROMPTS[task].format(digit), answer


def locations(box: Sequence[int], canvas: tuple[int, int]) -> str:
    """Pixels (y0, x0, y1, x1) as PaliGemma writes them: y before x, 1,024 bins along each side."""
    return "".join(f"<loc{min(int(value / side * 1024), 1023):04}>" for value, side in zip(box, (*canvas, *canvas)))


def detections(answer: str) -> list[tuple[np.ndarray, int]]:
    """The boxes (float[4]: y0, x0, y1, x1 in 1/1024 of the sides) and digits that an answer to `detect` names."""
    return [(np.array(found[:4], float), int(found[4])) for found in LOCATED.findall(answer)]


def to_detect(rng: np.random.Generator, digits: Sequence[int]) -> int:
    """A digit to ask for: in 5 of 6 cases one that is there."""
    absent = sorted(set(range(10)) - set(digits))
    return int(rng.choice(digits if rng.random() < 5 / 6 else absent))


def heldout(task: str, n: int, seed: int = 0) -> list[tuple[np.ndarray, str, str]]:
    """`n` samples (image uint8[S, S, 3], prompt, answer) of a task, made of digits that training never sees."""
    rng = np.random.default_rng([seed, list(PROMPTS).index(task)])
    scenes = compose(rng, glyphs(held_out=True), n)
    return [(scenes.images[i], *ask(scenes, i, task, to_detect(rng, scenes.digits(i)))) for i in range(n)]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (y0, x0, y1, x1)."""
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    both = sides.prod()
    return float(both / max((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both, 1e-9))


def score(task: str, answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """{"exact": share of answers equal to the truth}, and for `detect` also

    "found", the share of true boxes that an answer names with the right digit and IoU >= 0.5 (each answered box counts once), and
    "spurious", the share of answered boxes that are no such find.
    """
    result = {"exact": float(np.mean([answer == truth for answer, truth in zip(answers, truths)]))}
    if task == "detect":
        found = true = named = 0
        for answer, truth in zip(answers, truths):
            free, wanted = detections(answer), detections(truth)
            true, named = true + len(wanted), named + len(free)
            for box, digit in wanted:
                hit = next((i for i, (other, d) in enumerate(free) if d == digit and overlap(box, other) >= 0.5), None)
                if hit is not None:
                    free.pop(hit)
                    found += 1
        result |= {"found": found / max(true, 1), "spurious": (named - found) / max(named, 1)}
    return result
