"""Pictures of real handwritten digits, with questions and answers about them: what the embedded checkpoint is trained and judged on.

The digits are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, UCI "Optical recognition of handwritten digits"). They are divided
into training and held-out digits before anything is composed, so no scan is ever on both sides. Axes: B scenes, K digits of a scene
(left to right), G glyphs, N samples along a glyph's side, H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.processing.locations import (
    LAST_BIN,
    Detection,
    box_iou,
    location_text,
    parse_detections,
    with_masks,
)
from paligemma_jax.processing.mask_codec import SIDE, MaskCodec, load_codec

SIZE = 112  # pixels along the side of a training canvas
HELD_OUT = 300  # scans that training never sees
MAX_DIGITS = 4
GLYPH = 32  # samples along a glyph's side
CODEC = TINY / "vae-digits.safetensors"  # made by `training.masks`
NUMBERS = ("no", "one", "two", "three", "four")
PROMPTS = {"caption": "caption en", "ocr": "ocr", "count": "answer en how many digits?", "detect": "detect {}", "segment": "segment {}"}


@dataclass(frozen=True)
class Glyphs:
    """Digits cut out along their ink and stretched to a square."""

    alpha: np.ndarray  # float32[G, N, N], 1 where ink is
    aspect: np.ndarray  # float32[G], width / height before stretching
    labels: np.ndarray  # int[G]
    codes: np.ndarray | None = None  # int[G, 16] of their shapes (`coded`)


@dataclass(frozen=True)
class Scenes:
    """Composed pictures and what is on them. Digits are in reading order: by the x-centre of their box."""

    images: np.ndarray  # uint8[B, H, W, 3]
    labels: np.ndarray  # int[B, K], -1 where a scene has fewer digits
    boxes: np.ndarray  # int[B, K, 4]: y0, x0, y1, x1 in pixels, the tight box of the ink
    glyphs: np.ndarray  # int[B, K]: which glyph of the source
    masks: np.ndarray | None = None  # bool[B, K, H, W]: where the ink is
    codes: np.ndarray | None = None  # int[B, K, 16] of the masks, where the source has codes

    def digits(self, index: int) -> list[int]:
        return [int(label) for label in self.labels[index] if label >= 0]


def source() -> Any:
    """scikit-learn's handwritten digits; ValueError without it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits are scikit-learn's: pip install 'paligemma-jax[train]'") from None
    return load_digits()


@functools.cache
def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scans of one side of the fixed split: float[G, 8, 8] in 0..1 and their digits int[G]."""
    data = source()
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


def shapes(alpha: np.ndarray) -> np.ndarray:
    """float32[G, 64, 64] of glyphs float32[G, N, N]: 1 where ink is, as `masks_codec.square` cuts a mask out along its box."""
    side = lambda glyph: np.asarray(Image.fromarray(glyph).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return np.stack([side(glyph) > 0.5 for glyph in alpha]).astype(np.float32)


def coded(source: Glyphs) -> Glyphs:
    """The glyphs with the codes of their shapes by the embedded codec."""
    return replace(source, codes=load_codec(CODEC).encode(shapes(source.alpha)))


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
    masks = np.take_along_axis(alpha > 0.5, order[..., None, None], 1)
    labels = np.take_along_axis(np.where(placed, source.labels[chosen], -1), order, 1)
    chosen = np.take_along_axis(chosen, order, 1)
    boxes = np.take_along_axis(boxes * placed[..., None], order[..., None], 1)
    codes = None if source.codes is None else source.codes[chosen]
    return Scenes((np.clip(images, 0, 1) * 255).astype(np.uint8), labels, boxes, chosen, masks, codes)


def ask(scenes: Scenes, index: int, task: str, digit: int | None = None) -> tuple[str, str]:
    """(prompt, answer) of a task of `PROMPTS` about one scene; `digit` is the one to detect or segment (none there: the answer is empty)."""
    digits = scenes.digits(index)
    names = [str(d) for d in digits]
    if task == "caption":
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        answer = f"{NUMBERS[len(names)]} digit{'s' * (len(names) > 1)}: {listed}"
    elif task in ("detect", "segment"):
        height, width = scenes.images.shape[1:3]
        codes = scenes.codes[index].tolist() if task == "segment" and scenes.codes is not None else [()] * len(digits)
        things = [Detection(str(d), (x0, y0, x1, y1), codes=tuple(c)) for (y0, x0, y1, x1), d, c in zip(scenes.boxes[index].tolist(), digits, codes)]
        answer = location_text((thing for thing in things if thing.label == str(digit)), (width, height))
    else:
        answer = {"ocr": " ".join(names), "count": str(len(names))}[task]
    return PROMPTS[task].format(digit), answer


def to_detect(rng: np.random.Generator, digits: Sequence[int]) -> int:
    """A digit to ask for: in 5 of 6 cases one that is there."""
    absent = sorted(set(range(10)) - set(digits))
    return int(rng.choice(digits if rng.random() < 5 / 6 else absent))


def heldout_scenes(task: str, n: int, seed: int = 0) -> tuple[Scenes, list[int]]:
    """`n` scenes of digits that training never sees, and what digit to ask for in each."""
    rng = np.random.default_rng([seed, list(PROMPTS).index(task)])
    source = glyphs(held_out=True)
    scenes = compose(rng, coded(source) if task == "segment" else source, n)
    return scenes, [to_detect(rng, scenes.digits(i)) for i in range(n)]


def heldout(task: str, n: int, seed: int = 0) -> list[tuple[np.ndarray, str, str]]:
    """`n` samples (image uint8[S, S, 3], prompt, answer) of a task about them."""
    scenes, asked = heldout_scenes(task, n, seed)
    return [(scenes.images[i], *ask(scenes, i, task, asked[i])) for i in range(n)]


def score_answers(task: str, answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """{"exact": share of answers equal to the truth}, and for `detect` also

    "found", the share of true boxes that an answer names with the right digit and IoU >= 0.5 (each answered box counts once), and
    "spurious", the share of answered boxes that are no such find.
    """
    result = {"exact": float(np.mean([answer == truth for answer, truth in zip(answers, truths)]))}
    if task == "detect":
        found = true = named = 0
        for answer, truth in zip(answers, truths):
            free, wanted = (list(parse_detections(text, (LAST_BIN, LAST_BIN))) for text in (answer, truth))
            true, named = true + len(wanted), named + len(free)
            for thing in wanted:
                hit = next((i for i, other in enumerate(free) if other.label == thing.label and box_iou(thing.box, other.box) >= 0.5), None)
                if hit is not None:
                    free.pop(hit)
                    found += 1
        result |= {"found": found / max(true, 1), "spurious": (named - found) / max(named, 1)}
    return result


def mask_overlaps(answers: Sequence[str], scenes: Scenes, asked: Sequence[int], codec: MaskCodec) -> list[float]:
    """Of every digit that was asked for: intersection over union of its ink and the best of the masks answered that is not taken yet; 0 without."""
    height, width = scenes.images.shape[1:3]
    found = []
    for i, (answer, digit) in enumerate(zip(answers, asked)):
        free = [thing.mask for thing in with_masks(parse_detections(answer, (width, height)), (width, height), codec) if thing.mask is not None]
        for k in np.flatnonzero(scenes.labels[i] == digit):
            ink = scenes.masks[i, k] if scenes.masks is not None else np.zeros((height, width), bool)
            scores = [(ink & mask).sum() / (ink | mask).sum() for mask in free]
            found.append(max(scores, default=0.0))
            if scores:
                free.pop(int(np.argmax(scores)))
    return found
