"""How PaliGemma 2 was fine-tuned and measured on well-known data sets: prompts, resolutions, metrics, hyper-parameters.

"big_vision" is google-research/big_vision, configs/proj/paligemma/transfers/NAME.py at 0127fb6 (`sweep_best` where it has one). Learning rates are
those that did best for each model size on the validation data in table 14 of the PaliGemma 2 report (arXiv:2412.03555), which swept them at 224
pixels and took the rest from there. What all recipes share: AdamW with b2 0.999, the gradient's norm clipped at 1, a warm-up of 5 %, cosine decay,
and the loss as the mean over rows.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SHARED = {"beta2": 0.999, "clip": 1.0, "warmup": 0.05, "schedule": "cosine", "reduction": "examples"}


@dataclass(frozen=True)
class Recipe:
    about: str
    prompt: str  # with {} for the question, or the thing to find
    resolutions: tuple[int, ...]
    metrics: tuple[str, ...]
    new_tokens: int
    epochs: int  # over the pictures or questions, each with one of its answers
    learning_rate: Mapping[str, float]  # by size of the model
    source: str
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    batch_size: int = 256
    beams: int = 1
    answers: int = 1  # rows of a question in the data to learn from, as many on average as people answered
    at: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # what is other at a resolution

    def finetune(self, size: str = "3b", resolution: int = 224) -> dict[str, float | str]:
        """Fields of a `Finetune` for data with one row for each answer. ValueError for a size or a resolution that nobody tried."""
        if size not in self.learning_rate:
            raise ValueError(f"--size {size}: there are {', '.join(self.learning_rate)}")
        if resolution not in self.resolutions:
            raise ValueError(f"--resolution {resolution}: this was tried at {', '.join(map(str, self.resolutions))}")
        own = {name: getattr(self, name) for name in ("epochs", "weight_decay", "label_smoothing", "batch_size")}
        own |= {"learning_rate": self.learning_rate[size], **self.at.get(resolution, {})}
        return SHARED | own | {"epochs": round(own["epochs"] / self.answers, 2)}

    def commands(self, name: str, size: str = "3b", resolution: int = 224) -> str:
        """To make it so, as the shell takes it."""
        flags = " ".join(f"--{key.replace('_', '-')} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}" for key, value in
                         self.finetune(size, resolution).items())  # fmt: skip
        beams = f" --beams {self.beams}" if self.beams > 1 else ""
        measure = f"--metric {' '.join(self.metrics)} --max-new-tokens {self.new_tokens}{beams}"
        return (
            f"paligemma-jax finetune --model google/paligemma2-{size}-pt-{resolution} --data {name}-train.jsonl --output {name} {flags}\n"
            f"paligemma-jax evaluate --model {name}/model --data {name}-val.jsonl --output {name}-val {measure}"
        )


RATES = lambda small, middle, large: {"3b": small, "10b": middle, "28b": large}
REFCOCO = Recipe(
    "the mask of what an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)", "{}", (224, 448, 896), ("mask_iou", "box_accuracy"), 48, 100,
    RATES(1e-5, 3e-6, 1e-6), "big_vision refcoco_seg (there with dropout of 0.1 in the decoder at 224 pixels); learning rates: report, table 14",
    label_smoothing=0.3, at={896: {"batch_size": 64}}, answers=7,  # of RefCOCO's 16,994 pictures to learn from, with 120,624 expressions
)  # fmt: skip

RECIPES = {
    "textvqa": Recipe(
        "questions about text in pictures (TextVQA)", "answer en {}", (224, 448, 896), ("vqa",), 32, 5, RATES(3e-6, 6e-7, 1e-6),
        "big_vision textvqa; learning rates: report, table 14", answers=10, at={448: {"epochs": 10, "weight_decay": 3e-7}, 896: {"epochs": 10}},
    ),
    "vqav2": Recipe(
        "questions about pictures (VQAv2)", "answer en {}", (224, 448), ("vqa",), 32, 10, RATES(3e-6, 1e-6, 6e-7),
        "big_vision vqav2; learning rates: report, table 14", weight_decay=1e-6, answers=10, at={448: {"weight_decay": 0.0}},
    ),
    "docci": Recipe(
        "long, fine-grained captions (DOCCI)", "caption en", (448,), ("characters", "sentences", "cider"), 512, 10, RATES(1e-5, 3e-6, 1e-6),
        "the report (B.5) gives no figures: it used the protocol of PaliGemma (arXiv:2407.07726, 3.2.4), which tries 1 to 100 epochs and learning "
        "rates of 3e-6 to 3e-5; the middle of each is taken, and less for larger models, as the report advises (4.1.2); prompt: that of captions",
    ),
    "refcoco-detect": replace(
        REFCOCO, about="the box of what an expression refers to (RefCOCO, RefCOCO+, RefCOCOg)", prompt="detect {}",
        metrics=("box_accuracy", "box_iou"),
        source="big_vision refcoco_seg, which learns box and mask at once; prompt: that of detection in pre-training",
    ),
    "refcoco-segment": REFCOCO,
    "chartqa": Recipe(
        "questions about charts (ChartQA)", "{}", (224, 448, 896), ("relaxed_accuracy",), 48, 30, RATES(3e-6, 1e-6, 3e-7),
        "big_vision chartqa (there with dropout of 0.1 in the decoder); learning rates: report, table 14", weight_decay=1e-6, label_smoothing=0.2,
    ),
    "docvqa": Recipe(
        "questions about documents (DocVQA)", "{}", (224, 448, 896), ("anls",), 32, 10, RATES(6e-6, 3e-6, 3e-6),
        "big_vision docvqa; learning rates: report, table 14", weight_decay=1e-6,
    ),
    "coco-captions": Recipe(
        "captions (COCO)", "caption en", (224, 448), ("cider",), 32, 5, RATES(3e-6, 6e-7, 6e-7),
        "big_vision cococap; learning rates: report, table 14", weight_decay=1e-6, beams=2, answers=5,
    ),
}  # fmt: skip
