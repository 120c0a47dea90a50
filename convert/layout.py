"""Reorders one array from one layout to another. A layout names axes by letters; letters written together are one merged axis, 1 has size 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from paligemma_jax.model.config import PaliGemmaConfig


def layout_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that `layout` has with these axis sizes: shape("NH D", ...) == (N * H, D)."""
    return tuple(math.prod(sizes[letter] for letter in axis if letter != "1") for axis in layout.split())


def reorder(array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    """`array` laid out as `source`, laid out as `target`: reorder(w, "NH D", "D N H", sizes). A view where numpy can make one."""
    if source == target:
        return array
    letters, wanted = ([letter for letter in layout if letter not in " 1"] for layout in (source, target))
    split = array.reshape([sizes[letter] for letter in letters])
    return split.transpose([letters.index(letter) for letter in wanted]).reshape(layout_shape(target, sizes))


def axis_sizes(config: PaliGemmaConfig, path: str) -> dict[str, int]:
    """The size of every axis letter (`model/layers.py`) for the parameter at `path`; heads and MLP are those of its tower."""
    vision, decoder = config.vision, config.decoder
    sizes = {"D": decoder.hidden_size, "W": vision.hidden_size, "V": decoder.vocab_size, "P": vision.num_patches}
    sizes |= {"C": 3, "h": vision.patch_size, "w": vision.patch_size}
    if path.startswith("vision"):
        return sizes | {"N": vision.num_attention_heads, "H": vision.head_dim, "F": vision.intermediate_size}
    return sizes | {"N": decoder.num_attention_heads, "K": decoder.num_key_value_heads, "H": decoder.head_dim, "F": decoder.intermediate_size}
