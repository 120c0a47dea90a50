"""Real handwritten digits as glyphs: cut out along their ink, and bent at random for training.

They are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, UCI "Optical recognition of
handwritten digits"). The split into training and held-out scans is fixed before any glyph is made,
so that no scan is on both sides.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.processing.mask_codec import SIDE, load_codec

if TYPE_CHECKING:
    from sklearn.utils import Bunch

HELD_OUT = 300  # scans that training never sees
GLYPH = 32  # samples along a glyph's side
CODEC = TINY / "vae-digits.safetensors"  # made by `tiny.mask_codec`


@dataclass(frozen=True)
class Glyphs:
    """Digits cut out along their ink and stretched to a square of N x N samples."""

    alpha: np.ndarray  # float32[G, N, N], 1 where there is ink
    aspect: np.ndarray  # float32[G], width / height before stretching
    labels: np.ndarray  # int[G]
    codes: np.ndarray | None = None  # int[G, 16], mask codes of the shapes (`with_codes`)


def load_dataset() -> Bunch:
    """scikit-learn's handwritten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the handwritten digits need scikit-learn: pip install 'paligemma-jax[train]'"
        ) from None
    return load_digits()  # type: ignore[return-value]


@functools.cache
def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scans of one side of the split, float[G, 8, 8] in 0..1, and their labels int[G]."""
    data = load_dataset()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = np.sort(order[:HELD_OUT] if held_out else order[HELD_OUT:])
    return data.images[chosen] / 16, data.target[chosen]


@functools.cache
def glyphs(held_out: bool, copies: int = 0, size: int = GLYPH, gain: float = 1.6) -> Glyphs:
    """The scans of one side of the split as glyphs.

    Args:
        held_out: Whether to use the held-out side.
        copies: Make this many randomly bent copies of each scan (the same in every process). 0
            makes one that is not bent.
        size: Samples along a side.
        gain: Contrast at the edges of the ink; random in bent copies.
    """
    images, labels = scans(held_out)
    rng = np.random.default_rng(1) if copies else None
    repeats = max(copies, 1)
    cut = [_cut_out(scan, rng, size, gain) for _ in range(repeats) for scan in images]
    alpha, aspect = zip(*cut, strict=True)
    return Glyphs(np.stack(alpha), np.array(aspect, np.float32), np.tile(labels, repeats))


def _cut_out(
    scan: np.ndarray, rng: np.random.Generator | None, size: int, gain: float
) -> tuple[np.ndarray, float]:
    """Enlarge a scan smoothly, bend it if there is an `rng`, and cut it out along its ink:
    float32[size, size], and width / height."""
    side, threshold = 12 * 8, 0.5
    if rng is not None:
        scan = scan + rng.normal(0, 0.05, scan.shape)
        threshold, gain = rng.uniform(0.35, 0.6), rng.uniform(1.2, 3)
    image = Image.fromarray(np.pad(scan, 2).astype(np.float32))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    if rng is not None:
        corners = np.array([0, 0, 0, side, side, side, side, 0]) + rng.normal(0, 0.06 * side, 8)
        image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR)
        bend, quality = Image.Transform.QUAD, Image.Resampling.BILINEAR
        image = image.transform((side, side), bend, corners.tolist(), quality)
    alpha = np.clip((np.asarray(image) - threshold) * gain + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((alpha > 0.2).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    glyph = _resize(alpha[top:bottom, left:right], size)
    return glyph, (right - left) / (bottom - top)


def glyph_masks(alpha: np.ndarray) -> np.ndarray:
    """Masks float32[G, 64, 64] of glyphs float32[G, N, N], as `crop_mask` returns them."""
    return np.stack([_resize(glyph, SIDE) > 0.5 for glyph in alpha]).astype(np.float32)


def with_codes(source: Glyphs) -> Glyphs:
    """The glyphs with the codes of their masks, by the embedded codec."""
    return replace(source, codes=load_codec(CODEC).encode(glyph_masks(source.alpha)))


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
