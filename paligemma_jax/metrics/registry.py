"""All metrics by name, as `paligemma-jax evaluate --metric` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from paligemma_jax.metrics import answers, boxes, calibration, captions, tables, texts
from paligemma_jax.metrics.packages import load_package
from paligemma_jax.metrics.scores import Metric

GROUPS: dict[str, dict[str, Metric]] = {
    "pope": {
        "pope_accuracy": answers.pope_accuracy,
        "pope_f1": answers.pope_f1,
        "pope_precision": answers.pope_precision,
        "pope_recall": answers.pope_recall,
    },
    "coco": {"average_precision": boxes.average_precision, "ap50": boxes.ap50, "ap75": boxes.ap75},
}
METRICS: dict[str, Metric] = {
    "vqa": answers.vqa,
    "exact_match": answers.exact_match,
    "relaxed_accuracy": answers.relaxed_accuracy,
    "anls": answers.anls,
    "tallyqa": answers.tallyqa,
    "rsvqa": answers.rsvqa,
    **GROUPS["pope"],
    "rouge_l": texts.rouge_l,
    "cer": texts.cer,
    "ser": texts.ser,
    "ler": texts.ler,
    "mmvp_pairs": texts.mmvp_pairs,
    "teds": tables.teds,
    "s_teds": tables.s_teds,
    "cider": captions.cider,
    "bleu": captions.bleu,
    "characters": captions.characters,
    "sentences": captions.sentences,
    **GROUPS["coco"],
    "word_f1": boxes.word_f1,
    "box_calibration": calibration.box_calibration,
    "box_accuracy": boxes.box_accuracy,
    "box_iou": boxes.box_iou,
    "mask_iou": boxes.mask_iou,
}


# Modules of the extra `eval` by the metrics that need them.
TABLES = ("apted", "lxml.html", "rapidfuzz.distance")
MODULES = {"bleu": ("sacrebleu.metrics.bleu",), "teds": TABLES, "s_teds": TABLES}
MODULES |= dict.fromkeys(("cer", "ser", "ler"), ("rapidfuzz.distance",))


def metric_names(names: Iterable[str]) -> list[str]:
    """Expand groups of metrics and drop repeated names.

    Raises:
        ValueError: There are no names, an unknown one, or a metric whose package is missing.
    """
    names, choices = list(names), ", ".join([*METRICS, *GROUPS])
    for name in names:
        if name not in METRICS and name not in GROUPS:
            close = difflib.get_close_matches(name, [*METRICS, *GROUPS], n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"--metric must be one of {choices}; got {name}{hint}")
    if not names:
        raise ValueError(f"--metric needs at least one of {choices}; or pass --recipe")
    metrics = list(dict.fromkeys(metric for name in names for metric in GROUPS.get(name, [name])))
    for metric in metrics:  # before anything is answered
        for module in MODULES.get(metric, ()):
            load_package(module, METRICS[metric].title)
    return metrics
