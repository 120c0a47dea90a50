"""How the golden files of tests/golden store pixels and stages."""

from __future__ import annotations

import numpy as np

SAMPLES = 48  # values stored of every stage, besides mean and standard deviation


def from_bytes(values: np.ndarray) -> np.ndarray:
    return values / np.float32(127.5) - np.float32(1)


def sample(name: str, value: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """float64[2 + SAMPLES]: mean, standard deviation, SAMPLES values of a stage; no pads."""
    if name.startswith(("decoder", "logits")):
        value = value[
            np.broadcast_to(valid[:, None] if "weights" in name else valid, value.shape[:-1])
        ]
    flat = np.asarray(value, np.float64).reshape(-1)
    return np.concatenate(
        [[flat.mean(), flat.std()], flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]]
    )
