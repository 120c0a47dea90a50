"""A map of the image as a picture."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from PIL import Image

from paligemma_jax.processing.image import ImageSource, load_image

# Transparent blue over green to red, from the smallest value of a map to the largest.
COLORS = np.array([(30, 40, 160), (30, 170, 120), (250, 200, 40), (220, 40, 40)])


def overlay(
    image: ImageSource, values: Float[np.ndarray, "..."], opacity: float = 0.6
) -> Image.Image:
    """Draw a map over an image.

    Args:
        values: One value per pixel, [H, W]; or per patch, [P] with P a square number. They are
            stretched to the image, and to the colors from their smallest to their largest.

    Raises:
        ValueError: The values are no such map.
    """
    values = np.asarray(values, np.float32)
    side = round(values.size**0.5)
    if values.ndim == 1 and side**2 == values.size:
        values = values.reshape(side, side)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"values must be [H, W], or [P] with one value for each patch, got {list(values.shape)}"
        )
    picture = load_image(image).convert("RGB")
    low, high = values.min(), values.max()
    scaled = Image.fromarray((values - low) / max(high - low, 1e-12))
    heat = np.clip(np.asarray(scaled.resize(picture.size, Image.Resampling.BILINEAR)), 0, 1)
    stops = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(heat, stops, channel) for channel in COLORS.T], axis=-1)
    weight = opacity * heat[..., None]
    return Image.fromarray((np.asarray(picture) * (1 - weight) + colors * weight).astype(np.uint8))
