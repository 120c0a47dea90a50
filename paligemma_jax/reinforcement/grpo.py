"""Group relative policy optimization (GRPO, arXiv:2402.03300): a run learns from rewards.

Each step samples a group of answers to every prompt of the batch, scores them, and makes those more
likely that are better than the others of their group.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32


def group_advantages(
    rewards: Float32[np.ndarray, "B G"], scaled: bool = True
) -> Float32[np.ndarray, "B G"]:
    """How much better each answer is than the mean of its group.

    Args:
        scaled: Divide by the group's standard deviation, as in the paper; where all rewards of a
            group are equal, advantages are 0. Without, as in Dr. GRPO (arXiv:2503.20783), groups
            that differ little count little.
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if not scaled:
        return centered
    return centered / (rewards.std(axis=1, keepdims=True) + 1e-4)
