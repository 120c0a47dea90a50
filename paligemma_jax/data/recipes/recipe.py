"""One row of the table of recipes, and the commands that follow from it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

# What all transfers share: AdamW, gradients clipped to norm 1, 5 % warm-up, cosine decay, and the
# loss averaged over examples. Stated by big_vision; report 2 names nothing else for its own tasks.
SHARED = {
    "beta2": 0.999,
    "clip": 1.0,
    "warmup": 0.05,
    "schedule": "cosine",
    "reduction": "examples",
}
SQUARE = "each image resized to a square"
TRAINED = ("epochs", "steps", "weight_decay", "label_smoothing", "dropout", "batch_size")
# The freeze of big_vision's image encoder includes the projector.
FREEZE_VISION = {"train": "decoder"}


@dataclass(frozen=True)
class Source:
    """Where some figures of a recipe come from."""

    figures: str
    stated_by: str
    confirmed_by: str = ""  # the second source; empty if none was found


@dataclass(frozen=True)
class Recipe:
    """Prompt, metrics and hyper-parameters for a data set. None stands for "not published"."""

    about: str
    metrics: tuple[str, ...]
    sources: tuple[Source, ...]
    learning_rate: Mapping[str, float] = field(default_factory=dict)  # by model size
    prompt: str = "{}"  # {} stands for the question, or the object to locate
    preprocessing: str = SQUARE
    images: int = 1  # per row: images, or frames of a video
    resolutions: tuple[int, ...] = (224, 448, 896)
    epochs: float | None = None  # over images or questions, each with one of its answers
    steps: int | None = None  # instead of epochs
    batch_size: int | None = 256
    weight_decay: float | None = 0.0
    label_smoothing: float | None = 0.0
    dropout: float | None = 0.0  # in the decoder
    frozen: str = ""  # parts that are not trained
    answers: int = 1  # training rows per question, one for each answer on average
    overrides: Mapping[int, Mapping[str, float | str]] = field(default_factory=dict)  # by pixels
    new_tokens: int | None = 32  # longest answer
    beams: int = 1
    missing_metrics: tuple[str, ...] = ()  # published, but not computed by `evaluate`
    zero_shot_from: str = ""  # the task whose model is evaluated; nothing is trained
    note: str = ""  # on comparing with the published results

    def finetune(self, size: str = "3b", resolution: int | None = None) -> dict[str, float | str]:
        """Fields of a `FinetuneConfig`, for data with one row per answer.

        Args:
            resolution: Pixels; by default the lowest of the recipe.

        Raises:
            ValueError: The recipe does not cover this model size or resolution.
        """
        resolution = self._check_resolution(resolution)
        if self.zero_shot_from:
            raise ValueError(
                "this task is evaluated zero-shot: fine-tune with the recipe of "
                f"{self.zero_shot_from}"
            )
        if self.learning_rate and size not in self.learning_rate:
            choices = ", ".join(self.learning_rate)
            raise ValueError(f"--size must be one of {choices}, got {size}")
        values = {name: getattr(self, name) for name in TRAINED}
        fields: dict[str, float | str] = {k: v for k, v in values.items() if v is not None}
        if self.learning_rate:
            fields["learning_rate"] = self.learning_rate[size]
        fields |= FREEZE_VISION if self.frozen else {}
        fields |= self.overrides.get(resolution, {})
        if "epochs" in fields:
            fields["epochs"] = round(float(fields["epochs"]) / self.answers, 2)
        return SHARED | fields

    def commands(self, name: str, size: str = "3b", resolution: int | None = None) -> str:
        """The shell commands that fine-tune and evaluate a model."""
        resolution = self._check_resolution(resolution)
        lines = []
        if not self.zero_shot_from:
            finetune = ["paligemma-jax", "finetune"]
            finetune += ["--model", f"google/paligemma2-{size}-pt-{resolution}"]
            finetune += ["--data", f"{name}-train.jsonl", "--output", name]
            for key, value in self.finetune(size, resolution).items():
                text = f"{value:g}" if isinstance(value, float) else str(value)
                finetune += [f"--{key.replace('_', '-')}", text]
            lines.append(shlex.join(finetune))
        if self.metrics:
            evaluate = ["paligemma-jax", "evaluate", "--recipe", name]
            evaluate += ["--model", f"{self.zero_shot_from or name}/model"]
            evaluate += ["--data", f"{name}-val.jsonl", "--output", f"{name}-val"]
            lines.append(shlex.join(evaluate))
        return "\n".join(lines)

    def _check_resolution(self, resolution: int | None) -> int:
        if resolution is None:
            return self.resolutions[0]
        if resolution not in self.resolutions:
            choices = ", ".join(map(str, self.resolutions))
            raise ValueError(f"--resolution must be one of {choices}, got {resolution}")
        return resolution


def rates(small: float, medium: float, large: float | None = None) -> dict[str, float]:
    """Return learning rates by model size, given in units of 1e-6 as in table 14 of report 2."""
    sizes = {"3b": small, "10b": medium, "28b": large}
    return {size: round(rate * 1e-6, 9) for size, rate in sizes.items() if rate is not None}


def transfer_sources(config: str, rates_confirmed: bool = True) -> tuple[Source, ...]:
    """Sources of a transfer of report 1 that report 2 repeats.

    Args:
        config: Name of big_vision's configuration.
        rates_confirmed: Whether the learning rates were read in two places.
    """
    second = "a second reading of the table" if rates_confirmed else ""
    return (
        Source("training and decoding", "report 1, appendix J", f"big_vision {config}"),
        Source("prompt", f"big_vision {config}", "report 1, appendix B"),
        Source("longest answer", f"big_vision {config}"),
        Source("learning rates", "report 2, table 14", second),
    )
