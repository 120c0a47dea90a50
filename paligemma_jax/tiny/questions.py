"""Questions about scenes with their answers, and the scores of a model's answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paligemma_jax.processing.locations import (
    LAST_BIN,
    Detection,
    box_iou,
    location_text,
    parse_detections,
    with_masks,
)
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.tiny.digits import glyphs, with_codes
from paligemma_jax.tiny.scenes import Scenes, compose

PROMPTS = {
    "caption": "caption en",
    "ocr": "ocr",
    "count": "answer en how many digits?",
    "detect": "detect {}",
    "segment": "segment {}",
}
NUMBERS = ("no", "one", "two", "three", "four")


def ask(scenes: Scenes, index: int, task: str, digit: int | None = None) -> tuple[str, str]:
    """Return the prompt and the answer of a task about one scene.

    Args:
        scenes: Scenes; to segment, with codes.
        index: Index of the scene.
        task: A key of `PROMPTS`.
        digit: Digit to detect or segment. If the scene does not have it, the answer is empty.
    """
    names = [str(label) for label in scenes.digits(index)]
    if task == "caption":
        plural = "s" if len(names) > 1 else ""
        listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
        answer = f"{NUMBERS[len(names)]} digit{plural}: {listed}"
    elif task == "ocr":
        answer = " ".join(names)
    elif task == "count":
        answer = str(len(names))
    else:
        answer = _locations(scenes, index, names, str(digit), masks=task == "segment")
    return PROMPTS[task].format(digit), answer


def _locations(scenes: Scenes, index: int, names: list[str], label: str, masks: bool) -> str:
    """The boxes, with `masks` also the mask codes, of the digits named `label`."""
    height, width = scenes.images.shape[1:3]
    all_codes = scenes.codes if masks else None
    detections = []
    for k, name in enumerate(names):
        if name == label:
            y0, x0, y1, x1 = scenes.boxes[index, k].tolist()
            codes = () if all_codes is None else tuple(all_codes[index, k].tolist())
            detections.append(Detection(name, (x0, y0, x1, y1), codes=codes))
    return location_text(detections, (width, height))


def choose_digit(rng: np.random.Generator, digits: Sequence[int]) -> int:
    """A digit to ask for: in 5 of 6 cases one of `digits`."""
    absent = sorted(set(range(10)) - set(digits))
    return int(rng.choice(digits if rng.random() < 5 / 6 else absent))


def heldout_scenes(task: str, count: int, seed: int = 0) -> tuple[Scenes, list[int]]:
    """Scenes of digits that training never sees, and the digit to ask for in each."""
    rng = np.random.default_rng([seed, list(PROMPTS).index(task)])
    source = glyphs(held_out=True)
    scenes = compose(rng, with_codes(source) if task == "segment" else source, count)
    return scenes, [choose_digit(rng, scenes.digits(i)) for i in range(count)]


def heldout_examples(task: str, count: int, seed: int = 0) -> list[tuple[np.ndarray, str, str]]:
    """Images uint8[S, S, 3], prompts and answers about scenes of held-out digits."""
    scenes, digits = heldout_scenes(task, count, seed)
    return [(scenes.images[i], *ask(scenes, i, task, digits[i])) for i in range(count)]


def score_answers(task: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Scores of the answers to a task.

    Returns:
        "exact": the fraction of answers equal to their references. For `detect` also "found", the
        fraction of reference boxes matched by an answered box of the same label with an IoU of at
        least 0.5, and "spurious", the fraction of answered boxes without a match.
    """
    pairs = list(zip(answers, references, strict=True))
    scores = {"exact": float(np.mean([answer == reference for answer, reference in pairs]))}
    if task != "detect":
        return scores
    matched = expected = answered = 0
    for pair in pairs:
        free, boxes = (list(parse_detections(text, (LAST_BIN, LAST_BIN))) for text in pair)
        expected, answered = expected + len(boxes), answered + len(free)
        for box in boxes:
            match = next((candidate for candidate in free if _matches(candidate, box)), None)
            if match is not None:
                free.remove(match)
                matched += 1
    spurious = (answered - matched) / max(answered, 1)
    return scores | {"found": matched / max(expected, 1), "spurious": spurious}


def _matches(answer: Detection, reference: Detection) -> bool:
    return answer.label == reference.label and box_iou(reference.box, answer.box) >= 0.5


def mask_ious(
    answers: Sequence[str], scenes: Scenes, digits: Sequence[int], codec: MaskCodec
) -> list[float]:
    """For every digit asked for, the IoU of its ink and the best unmatched mask of the answer; 0
    without one."""
    assert scenes.masks is not None
    height, width = scenes.images.shape[1:3]
    ious = []
    for i, (answer, digit) in enumerate(zip(answers, digits, strict=True)):
        size = (width, height)
        detections = with_masks(parse_detections(answer, size), size, codec)
        free = [detection.mask for detection in detections if detection.mask is not None]
        for k in np.flatnonzero(scenes.labels[i] == digit):
            ink = scenes.masks[i, k]
            candidates = [(ink & mask).sum() / (ink | mask).sum() for mask in free]
            ious.append(max(candidates, default=0.0))
            if candidates:
                free.pop(int(np.argmax(candidates)))
    return ious
