"""All metrics: functions `name(predictions, references) -> float`; `name.scores(...)` tells more (`paligemma_jax.metrics.scores`)."""

from paligemma_jax.metrics.answers import (
    anls,
    average_accuracy,
    exact_match,
    pope_accuracy,
    pope_f1,
    pope_precision,
    pope_recall,
    relaxed_accuracy,
    rsvqa,
    tallyqa,
    vqa,
)
from paligemma_jax.metrics.boxes import (
    ap50,
    ap75,
    average_precision,
    box_accuracy,
    box_iou,
    mask_iou,
)
from paligemma_jax.metrics.captions import bleu, characters, cider, non_entailment, sentences
from paligemma_jax.metrics.scores import Metric, Scores

__all__ = [
    "Metric", "Scores", "anls", "ap50", "ap75", "average_accuracy", "average_precision", "bleu", "box_accuracy", "box_iou", "characters", "cider",
    "exact_match", "mask_iou", "non_entailment", "pope_accuracy", "pope_f1", "pope_precision", "pope_recall", "relaxed_accuracy", "rsvqa",
    "sentences", "tallyqa", "vqa",
]  # fmt: skip
