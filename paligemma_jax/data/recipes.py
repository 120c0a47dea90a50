"""How PaliGemma 2 was fine-tuned and evaluated on published data sets.

"big_vision" is google-research/big_vision, configs/proj/paligemma/transfers/NAME.py at 0127fb6
(`sweep_best` where it has one). "report" is the PaliGemma 2 report (arXiv:2412.03555): its table 14
has the learning rates that did best for each model size on the validation data, swept at 224 pixels
and used at every resolution.

All recipes share AdamW with b2 0.999, gradients clipped to norm 1, 5 % warm-up, cosine decay, and
the loss averaged over examples.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SHARED = {
    "beta2": 0.999,
    "clip": 1.0,
    "warmup": 0.05,
    "schedule": "cosine",
    "reduction": "examples",
}


@dataclass(frozen=True)
class Recipe:
    """Prompt, metrics and hyper-parameters for a data set."""

    about: str
    metrics: tuple[str, ...]
    epochs: int  # over images or questions, each with one of its answers
    learning_rate: Mapping[str, float]  # by model size
    source: str
    prompt: str = "{}"  # {} stands for the question, or the object to locate
    resolutions: tuple[int, ...] = (224, 448, 896)
    new_tokens: int = 32  # longest answer
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0  # in the decoder
    batch_size: int = 256
    beams: int = 1
    answers: int = 1  # training rows per question, one for each answer on average
    overrides: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # by resolution

    def finetune(self, size: str = "3b", resolution: int = 224) -> dict[str, float | str]:
        """Fields of a `FinetuneConfig`, for data with one row per answer.

        Raises:
            ValueError: The recipe does not cover this model size or resolution.
        """
        if size not in self.learning_rate:
            choices = ", ".join(self.learning_rate)
            raise ValueError(f"--size must be one of {choices}, got {size}")
        if resolution not in self.resolutions:
            choices = ", ".join(map(str, self.resolutions))
            raise ValueError(f"--resolution must be one of {choices}, got {resolution}")
        names = ("epochs", "weight_decay", "label_smoothing", "dropout", "batch_size")
        fields: dict[str, float] = {name: getattr(self, name) for name in names}
        fields["learning_rate"] = self.learning_rate[size]
        fields |= self.overrides.get(resolution, {})
        return SHARED | fields | {"epochs": round(fields["epochs"] / self.answers, 2)}

    def commands(self, name: str, size: str = "3b", resolution: int = 224) -> str:
        """The shell commands that fine-tune and evaluate a model."""
        finetune = ["paligemma-jax", "finetune"]
        finetune += ["--model", f"google/paligemma2-{size}-pt-{resolution}"]
        finetune += ["--data", f"{name}-train.jsonl", "--output", name]
        for key, value in self.finetune(size, resolution).items():
            text = f"{value:g}" if isinstance(value, float) else str(value)
            finetune += [f"--{key.replace('_', '-')}", text]
        evaluate = ["paligemma-jax", "evaluate", "--model", f"{name}/model"]
        evaluate += ["--data", f"{name}-val.jsonl", "--output", f"{name}-val"]
        evaluate += ["--metric", *self.metrics, "--max-new-tokens", str(self.new_tokens)]
        if self.beams > 1:
            evaluate += ["--beams", str(self.beams)]
        return f"{shlex.join(finetune)}\n{shlex.join(evaluate)}"


def _rates(small: float, medium: float, large: float) -> dict[str, float]:
    return {"3b": small, "10b": medium, "28b": large}


REFCOCO = Recipe(
    about="the mask of the object that an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)",
    metrics=("mask_iou", "box_accuracy"),
    new_tokens=48,
    epochs=100,
    learning_rate=_rates(1e-5, 3e-6, 1e-6),
    source="big_vision refcoco_seg; learning rates: report, table 14",
    label_smoothing=0.3,
    answers=7,  # RefCOCO's 16,994 training images have 120,624 expressions
    overrides={224: {"dropout": 0.1}, 896: {"batch_size": 64}},
)

RECIPES = {
    "textvqa": Recipe(
        about="questions about text in images (TextVQA)",
        prompt="answer en {}",
        metrics=("vqa",),
        epochs=5,
        learning_rate=_rates(3e-6, 6e-7, 1e-6),
        source="big_vision textvqa; learning rates: report, table 14",
        answers=10,
        overrides={448: {"epochs": 10, "weight_decay": 3e-7}, 896: {"epochs": 10}},
    ),
    "vqav2": Recipe(
        about="questions about images (VQAv2)",
        prompt="answer en {}",
        resolutions=(224, 448),
        metrics=("vqa",),
        epochs=10,
        learning_rate=_rates(3e-6, 1e-6, 6e-7),
        source="big_vision vqav2; learning rates: report, table 14",
        weight_decay=1e-6,
        answers=10,
        overrides={448: {"weight_decay": 0.0}},
    ),
    "docci": Recipe(
        about="long, fine-grained captions (DOCCI)",
        prompt="caption en",
        resolutions=(448,),
        metrics=("characters", "sentences", "cider"),
        new_tokens=512,
        epochs=10,
        learning_rate=_rates(1e-5, 3e-6, 1e-6),
        source="the report (B.5) gives no figures: it used the protocol of PaliGemma "
        "(arXiv:2407.07726, 3.2.4), which tries 1 to 100 epochs and learning rates of 3e-6 to "
        "3e-5. This recipe uses the middle of each range, lower rates for larger models, as the "
        "report advises (4.1.2), and the prompt for captions",
    ),
    "refcoco-detect": replace(
        REFCOCO,
        about="the box of the object that an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)",
        prompt="detect {}",
        metrics=("box_accuracy", "box_iou"),
        source="big_vision refcoco_seg, which trains on box and mask at once; "
        "the detection prompt of pretraining",
    ),
    "refcoco-segment": REFCOCO,
    "chartqa": Recipe(
        about="questions about charts (ChartQA)",
        metrics=("relaxed_accuracy",),
        new_tokens=48,
        epochs=30,
        learning_rate=_rates(3e-6, 1e-6, 3e-7),
        source="big_vision chartqa; learning rates: report, table 14",
        weight_decay=1e-6,
        label_smoothing=0.2,
        dropout=0.1,
    ),
    "docvqa": Recipe(
        about="questions about documents (DocVQA)",
        metrics=("anls",),
        epochs=10,
        learning_rate=_rates(6e-6, 3e-6, 3e-6),
        source="big_vision docvqa; learning rates: report, table 14",
        weight_decay=1e-6,
    ),
    "coco-captions": Recipe(
        about="captions (COCO)",
        prompt="caption en",
        resolutions=(224, 448),
        metrics=("cider",),
        epochs=5,
        learning_rate=_rates(3e-6, 6e-7, 6e-7),
        source="big_vision cococap; learning rates: report, table 14",
        weight_decay=1e-6,
        beams=2,
        answers=5,
    ),
}
