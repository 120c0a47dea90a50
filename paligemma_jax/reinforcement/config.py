"""The options of reinforcement learning: the flags of `finetune --objective grpo`.

Imports no jax, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_jax.reinforcement.rewards import Reward

    RewardChoice = str | Reward
else:
    RewardChoice = str  # all that a command line can give

# (requirement, check, names of the fields)
RANGES: list[tuple[str, Callable[..., bool], str]] = [
    ("an integer of at least 2", lambda x: isinstance(x, int) and x >= 2, "group"),
    ("an integer of at least 1", lambda x: isinstance(x, int) and x >= 1, "max_new_tokens"),
    ("above 0 and below 1", lambda x: 0 < x < 1, "ratio_clip"),
    ("at least 0 and finite", lambda x: 0 <= x < inf, "kl"),
]


@dataclass(frozen=True)
class GRPOConfig:
    """Options of GRPO (arXiv:2402.03300).

    Raises:
        ValueError: A value is out of range.
    """

    reward: RewardChoice = "exact"
    """Reward of an answer: exact, iou, box_ap, anls or format; in Python also a function (answer,
    example) -> number."""
    group: int = 8
    """Answers to sample for each prompt."""
    max_new_tokens: int = 64
    """Maximum length of a sampled answer in tokens."""
    ratio_clip: float = 0.2
    """Clip the ratio of new to old probabilities to 1 plus or minus this."""
    kl: float = 0.04
    """Weight of the KL divergence from the model at the start; 0 needs no memory for it."""
    std: bool = True
    """Divide advantages by the standard deviation of their group, as in the paper; without, as in
    Dr. GRPO (arXiv:2503.20783)."""

    def __post_init__(self):
        for requirement, is_valid, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (is_number and is_valid(value)):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} must be {requirement}, got {value!r}")

    def settings(self) -> dict[str, Any]:
        """The options as JSON values; a function by its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.reward, str):
            values["reward"] = getattr(self.reward, "__qualname__", repr(self.reward))
        return {"objective": "grpo", **values}
