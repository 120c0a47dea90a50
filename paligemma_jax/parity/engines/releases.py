"""Which releases of transformers compute alike, and how each masks a call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from paligemma_jax.model.numerics import NUMERICS, Numerics

# How transformers is called: with token types and labels, with token types only, or with neither.
Call = Literal["labels", "forward", "plain"]
CALLS: dict[Call, str] = {
    "labels": "with token types and labels",
    "forward": "with token types, without labels",
    "plain": "without token types",
}
# The first and the last release with a profile, in the order of release. Found by running 4.47.1,
# 4.48.3, 4.49.0, 4.50.3, 4.51.3, 4.52.1, 4.52.4, 4.53.0, 4.53.3, 4.55.4, 4.56.2, 4.57.1, 4.57.6,
# 5.0.0, 5.3.0, 5.4.0, 5.6.2, 5.8.1, 5.9.0, 5.10.4, 5.22.0, 5.22.2, 5.23.0 and 5.24.0: neighbors
# with the same profile have the same outputs bit by bit, in float32 and bfloat16.
RELEASES = {
    "transformers-4.47": ("4.47", "4.51"),
    "transformers-4.52": ("4.52", "4.52"),
    "transformers-4.53": ("4.53", "4.55"),
    "transformers-4.56": ("4.56", "4.57"),
    "transformers-5.0": ("5.0", "5.3"),
    "transformers-5.4": ("5.4", "5.8"),
    "transformers-5.9": ("5.9", "5.22"),
    "transformers": ("5.23", "5.24"),
}
# What a value of a field of `Numerics` means, for users.
MEANINGS = {
    ("window", "none"): "no sliding window over prompt and answer",
    ("window", "causal"): "the sliding window narrows the answer only",
    ("window", "all"): "the sliding window narrows image and prompt, too",
    ("window", "both"): "the sliding window narrows image and prompt on both sides",
    ("window_decode", False): "no sliding window for generated tokens",
    ("window_decode", True): "a sliding window for generated tokens",
    ("capped_prefill", False): "no final softcap",
    ("capped_prefill", True): "a final softcap",
    ("capped_decode", False): "no final softcap on generated tokens",
    ("capped_decode", True): "a final softcap on generated tokens",
    ("scaled_features", False): "image features are not scaled",
    ("scaled_features", True): "image features are divided by sqrt(D) and scaled again",
    ("first_position", 0): "positions from 0",
    ("first_position", 1): "positions from 1",
    ("scale_query", False): "scores are scaled",
    ("scale_query", True): "queries are scaled",
    ("head_dim_scale", False): "scores are scaled by the config's query_pre_attn_scalar",
    ("head_dim_scale", True): "scores are scaled by the size of a head",
    ("float32_activations", False): "activations in the dtype of the weights",
    ("float32_activations", True): "activations in float32",
}


def profile_of(version: str) -> str:
    """The profile of a release of transformers. ValueError if it has no PaliGemma 2."""
    numbers = _numbers(version)
    if not numbers:
        raise ValueError(f"the release of transformers must be like 4.57.1, got {version!r}")
    profiles = [name for name, (first, _) in RELEASES.items() if _numbers(first) <= numbers]
    if not profiles:
        raise ValueError(f"transformers must be 4.47 or newer for PaliGemma 2, got {version}")
    return profiles[-1]


def describe(profiles: Sequence[str]) -> str:
    """Name programs and releases: "transformers 5.0 to 5.22, big_vision"."""
    spans: list[list[str]] = []
    names, others = list(RELEASES), [name for name in profiles if name not in RELEASES]
    for place, name in enumerate(names):
        if name not in profiles:
            continue
        first, last = RELEASES[name]
        if spans and place and names[place - 1] in profiles:
            spans[-1][1] = last
        else:
            spans.append([first, last])
    releases = [first if first == last else f"{first} to {last}" for first, last in spans]
    return ", ".join(([f"transformers {', '.join(releases)}"] if releases else []) + others)


def visible_prefix(numerics: Numerics, call: Call, targets: np.ndarray) -> np.ndarray:
    """The tokens bool[B, T] that attend to each other both ways in a call of transformers."""
    if call == "plain":
        return np.full_like(targets, numerics.bidirectional_without_types, bool)
    if call == "forward" and not numerics.prefix_without_labels:
        return np.ones_like(targets, bool)
    return ~targets


def changes(since: str, to: str) -> list[str]:
    """What a profile computes that another does not, in words."""
    old, new = NUMERICS[since], NUMERICS[to]
    values = {name: value for name, value in vars(new).items() if value != getattr(old, name)}
    return [MEANINGS[item] for item in values.items() if item in MEANINGS]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else ()
