"""Axis layouts of arrays.

A layout is a string of axis letters, such as "NH D": letters written together are one merged axis,
and "1" is an axis of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from paligemma_jax.model.config import PaliGemmaConfig


def layout_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a layout: layout_shape("NH D", sizes) == (N * H, D)."""
    axes = [axis.strip("1") for axis in layout.split()]
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)


def reorder(array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Return `array` in another layout, as in reorder(w, "NH D", "D N H", sizes). The result is a
    view where numpy can make one."""
    if source == target:
        return array
    old, new = ([letter for letter in layout if letter not in " 1"] for layout in (source, target))
    split = array.reshape([sizes[letter] for letter in old])
    transposed = split.transpose([old.index(letter) for letter in new])
    return transposed.reshape(layout_shape(target, sizes))


def axis_sizes(config: PaliGemmaConfig, path: str) -> dict[str, int]:
    """The size of every axis letter (`model/layers.py`) for the parameter at `path`. Heads and MLP
    width depend on its tower."""
    vision, decoder = config.vision, config.decoder
    tower = vision if path.startswith("vision") else decoder
    return {
        "D": decoder.hidden_size,
        "W": vision.hidden_size,
        "V": decoder.vocab_size,
        "P": vision.num_patches,
        "C": 3,
        "h": vision.patch_size,
        "w": vision.patch_size,
        "N": tower.num_attention_heads,
        "K": decoder.num_key_value_heads,
        "H": tower.head_dim,
        "F": tower.intermediate_size,
    }
