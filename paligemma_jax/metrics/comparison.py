"""Extract the predictions and references of cases that each metric compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.metrics.scores import Scores
from paligemma_jax.processing.mask_codec import MaskCodec


class LazyMasks(Sequence[np.ndarray | None]):
    """Masks computed on access, because those of all cases would not fit in memory."""

    def __init__(self, mask: Callable[[Case], np.ndarray | None], cases: Sequence[Case]):
        self.mask, self.cases = mask, cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> np.ndarray | None:  # type: ignore[override]
        return self.mask(self.cases[index])


def score_cases(name: str, cases: Sequence[Case], codec: MaskCodec | None = None) -> Scores:
    """Score the answers of cases.

    Args:
        name: Name of a metric.
        codec: Decodes the masks of answers and references.

    Raises:
        ValueError: A case has no reference of the kind that the metric compares.
    """
    metric = METRICS[name]
    if metric.compares == "texts":
        return metric.scores([case.answer for case in cases], [case.references for case in cases])
    if metric.compares == "mask":
        masks = LazyMasks(lambda case: case.mask(codec), cases)
        return metric.scores(masks, LazyMasks(lambda case: case.reference_mask(codec), cases))
    references = [case.reference_detections for case in cases]
    detections = [case.detections for case in cases]
    if metric.compares == "detections":
        if not any(references):
            raise ValueError(f'--metric {name} needs "boxes" in the rows, or <loc> in their suffix')
        return metric.scores(detections, references)
    for case, objects in zip(cases, references, strict=True):
        if not objects:
            raise ValueError(
                f"--metric {name} needs a box in every row, but {case.name} has none: "
                "use --metric coco"
            )
    boxes = [objects[0].box if objects else None for objects in detections]
    return metric.scores(boxes, [objects[0].box for objects in references])
