"""Rewards: plain functions (answer, example) -> number, better answers higher.

Those of `REWARDS` are from 0 to 1 and compare with the row's suffix, which augmentation keeps in
line with the image; texts are compared with all of the row's "answers", if it has any.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable

import numpy as np

from paligemma_jax.data.rows import Example, error_prefix
from paligemma_jax.metrics import answers, boxes
from paligemma_jax.processing.locations import LAST_BIN, Detections, parse_detections

Reward = Callable[[str, Example], float]

BINS = (LAST_BIN, LAST_BIN)  # IoU is the same in bins and in pixels
LABELS = re.compile(r"(?:detect|segment) (.+)")  # a prompt that names objects


def exact(answer: str, example: Example) -> float:
    """1 if the answer equals a reference, except for surrounding spaces."""
    return float(answers.exact_match([answer], [_references(example)]))


def anls(answer: str, example: Example) -> float:
    """ANLS (DocVQA): similarity to the nearest reference by edit distance, 0 below one half."""
    return float(answers.anls([answer], [_references(example)]))


def box_ap(answer: str, example: Example) -> float:
    """F1 of the boxes, averaged over IoU thresholds of 0.5, 0.55, ..., 0.95.

    This is the score of a single image in `metrics.boxes.average_precision`: AP itself ranks the
    boxes of many images. It is 1 if there is nothing to detect and nothing was detected.
    """
    found, expected = _detections(answer), _reference_detections(example)
    return float(boxes.average_precision.scores([found], [expected]).each[0])


def iou(answer: str, example: Example) -> float:
    """The sum of the IoUs of matched boxes, divided by the larger number of boxes.

    The pair with the highest IoU is matched first; labels must be equal. Unlike `box_ap`, it grows
    with every step towards the reference. It is 1 if there is nothing to detect and nothing was
    detected.
    """
    found, expected = _detections(answer), _reference_detections(example)
    if not found or not expected:
        return float(len(found) == len(expected))
    same_label = [[a.label == b.label for b in expected] for a in found]
    table = boxes.overlaps([a.box for a in found], [b.box for b in expected]) * same_label
    total = 0.0
    for _ in range(min(table.shape)):
        i, j = np.unravel_index(table.argmax(), table.shape)
        total += table[i, j]
        table[i], table[:, j] = 0, 0
    return float(total / max(table.shape))


def box_format(answer: str, example: Example) -> float:
    """1 if the answer has only valid boxes or masks with labels of the prompt, or is empty."""
    prompt = LABELS.fullmatch(example.prefix.strip())
    if prompt is None:
        raise ValueError(
            f"reward format requires the prompt to be detect or segment with labels, "
            f"got {example.prefix!r}"
        )
    labels = {label.strip() for label in prompt[1].split(";")}
    found = _detections(answer)
    return float(not found.skipped and all(item.label in labels for item in found))


REWARDS: dict[str, Reward] = {
    "exact": exact,
    "iou": iou,
    "box_ap": box_ap,
    "anls": anls,
    "format": box_format,
}


def resolve_reward(reward: str | Reward) -> Reward:
    """Return a function, or the reward of that name.

    Raises:
        ValueError: There is no such reward.
    """
    if callable(reward):
        return reward
    if reward not in REWARDS:
        close = difflib.get_close_matches(str(reward), REWARDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}; got {reward}{hint}")
    return REWARDS[reward]


def score_answer(reward: Reward, answer: str, example: Example) -> float:
    """The reward of an answer.

    Raises:
        ValueError: The row lacks what the reward needs, or the reward is not a finite number.
    """
    with error_prefix(f"row {example.line}"):
        value = reward(answer, example)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"a reward must be a finite number, got {value!r}")
        return number


def _references(example: Example) -> list[str]:
    """All correct answers."""
    several = example.row.get("answers")
    if several is None:
        return [example.suffix]
    return [several] if isinstance(several, str) else list(several)  # type: ignore[arg-type]


def _detections(text: str) -> Detections:
    return parse_detections(text, BINS)


def _reference_detections(example: Example) -> Detections:
    detections = _detections(example.suffix)
    if detections.skipped:
        raise ValueError(
            "rewards of boxes require a suffix of boxes like <loc0102><loc0204><loc0512><loc0307> "
            f"cat, or an empty one, got {example.suffix!r}"
        )
    return detections
