"""Evaluate a model on held-out digits: the figures of `tiny` in the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paligemma_jax.evaluation import html
from paligemma_jax.evaluation.cases import collect
from paligemma_jax.evaluation.evaluate import Evaluation, evaluate
from paligemma_jax.evaluation.report import format_interval, format_value
from paligemma_jax.inference.offline import predict
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.views import BoxOptions
from paligemma_jax.metrics.boxes import matches
from paligemma_jax.metrics.registry import METRICS, metric_names
from paligemma_jax.tiny.dataset import Task, write_digits

TASKS: Mapping[Task, tuple[str, ...]] = {
    "ocr": ("exact_match",),
    "caption": ("cider", "bleu"),
    "count": ("exact_match",),
    "detect": ("coco", "box_calibration"),
    "segment": ("mask_iou", "box_accuracy"),
}
NEW_TOKENS = 128


def evaluate_tiny(
    predictor: Predictor,
    output: str | Path,
    rows: int = 200,
    boxes: BoxOptions = BoxOptions(),
    batch_size: int = 16,
    settings: Mapping[str, object] = {},
    resume: bool = False,
) -> dict[str, Evaluation]:
    """Answer and evaluate each task. Each gets a folder in `output` with its answers and report.

    Args:
        rows: Images for each task.
        boxes: Views of each image, for detect and segment.
        settings: As in `predict`.
        resume: Continue with the answers in `output`.

    Raises:
        ValueError: The checkpoint has no mask codec, or a folder cannot be used.
    """
    codec = predictor.codec
    folder = Path(output)
    write_digits(str(folder / "digits"), tuple(TASKS), rows)
    evaluations = {}
    for task, names in TASKS.items():
        data, run = folder / "digits" / f"{task}.jsonl", folder / task
        metrics = metric_names(names)
        predict(
            predictor,
            data,
            run,
            DecodingOptions(NEW_TOKENS),
            pieces=any(METRICS[name].compares != "texts" for name in metrics),
            boxes=boxes if task in ("detect", "segment") else BoxOptions(),
            batch_size=batch_size,
            settings=settings,
            resume=resume,
        )
        about = {"data": f"{rows} images of held-out digits", "task": task}
        evaluation = evaluate(collect(data, run), metrics, codec=codec, about=about)
        evaluation.save(run)
        html.save(evaluation, run)
        evaluations[task] = evaluation
    return evaluations


def boxes_found(evaluation: Evaluation) -> float:
    """The share of reference boxes that are found at an IoU of 0.5."""
    found = [matches(case.detections, case.reference_detections) for case in evaluation.cases]
    boxes = sum(len(case.reference_detections) for case in evaluation.cases)
    return sum(hit for pairs in found for _, hit in pairs) / boxes


def format_table(evaluations: Mapping[str, Evaluation]) -> str:
    """A line for each task and metric, with its 95 % interval."""
    lines = [f"{'task':8} {'metric':30} {'value':>7}  95 %"]
    for task, evaluation in evaluations.items():
        for name, interval in evaluation.intervals.items():
            value = format_value(name, interval.value)
            title, ends = METRICS[name].title, format_interval(name, interval)
            lines.append(f"{task:8} {title:30} {value:>7}  {ends}")
        if task == "detect":
            found = f"{100 * boxes_found(evaluation):.1f}"
            lines.append(f"{task:8} {'boxes found at 0.5':30} {found:>7}")
    return "\n".join(lines)
