"""A second recipe: teach `tiny` a new task, `answer en what is the sum?`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tyro

from paligemma_jax.inference.loading import load
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.tiny.digits import glyphs
from paligemma_jax.tiny.scenes import compose
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.runs import check_run_folder

PROMPT = "answer en what is the sum?"
CONFIG = FinetuneConfig(data="", output="", batch_size=32, save_every=200)


class Sums:
    """Scenes with the sum of their digits, by index."""

    def __init__(self, rows: int, held_out: bool = False):
        self.rows, self.seed = rows, int(held_out)
        self.source = glyphs(held_out=held_out, copies=0 if held_out else 12)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
        scenes = compose(np.random.default_rng((self.seed, index)), self.source, 1)
        suffix = str(sum(scenes.digits(0)))
        return {"image": scenes.images[0], "prefix": PROMPT, "suffix": suffix}


def accuracy(predictor: Predictor, rows: int = 500) -> float:
    """The fraction of correct answers about scenes of held-out digits."""
    sums = Sums(rows, held_out=True)
    examples = [sums[i] for i in range(rows)]
    images = [example["image"] for example in examples]
    answers = predictor.generate(images, [PROMPT] * rows, 8, batch_size=100)
    pairs = zip(answers, examples, strict=True)
    return float(np.mean([answer == example["suffix"] for answer, example in pairs]))


def teach_sums(
    output: str,
    resume: bool = False,
    model: str = "tiny",
    train: str = "lora",
    quantize: str | None = None,
    rank: int = 8,
    steps: int = 600,
    learning_rate: float = 3e-3,
) -> None:
    """Teach a model to add digits, in minutes on two CPU cores, and print the fraction of correct
    answers on 500 scenes of held-out digits before and after.

    Examples:
        python -m paligemma_jax.tiny.sums --output DIR
        python -m paligemma_jax.tiny.sums --output DIR --quantize nf4
        python -m paligemma_jax.tiny.sums --output DIR --train all --learning-rate 3e-4

    Args:
        output: Directory of the run.
        resume: Resume the run in --output.
        model: Checkpoint to start from.
        train: Parameters to train, as for `finetune`.
        quantize: Format of the frozen weights, for QLoRA: nf4, for example.
        rank: LoRA rank.
        steps: Training steps.
        learning_rate: Peak learning rate.
    """
    config = replace(
        CONFIG,
        output=output,
        resume=resume,
        model=model,
        train=train,
        quantize=quantize,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        steps=steps,
        learning_rate=learning_rate,
    )
    check_run_folder(config)
    print(f"before: {accuracy(load(model)):.1%}")
    result = finetune(config, Sums(config.batch_size * steps))
    print(f"after: {accuracy(load(result, quantize=quantize)):.1%}")


def main() -> None:
    tyro.cli(teach_sums, prog="python -m paligemma_jax.tiny.sums")


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
