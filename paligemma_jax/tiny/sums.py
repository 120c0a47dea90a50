"""A second recipe: `tiny` learns, in minutes on two CPU cores, what it was never asked: `answer en what is the sum?`

    python -m paligemma_jax.tiny.sums --output DIR                       # LoRA
    python -m paligemma_jax.tiny.sums --output DIR --quantize nf4        # QLoRA
    python -m paligemma_jax.tiny.sums --output DIR --train all --learning-rate 3e-4

It prints the share of right answers about 500 scenes of held-out digits, before and after.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from paligemma_jax.inference.loading import load
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.tiny import digits
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.runs import check_run_folder

PROMPT = "answer en what is the sum?"


class Sums:
    """Scenes by number, with the sum of their digits to tell."""

    def __init__(self, rows: int, held_out: bool = False):
        self.rows, self.seed = rows, int(held_out)
        self.source = digits.glyphs(held_out=held_out, copies=0 if held_out else 12)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        scenes = digits.compose(np.random.default_rng((self.seed, index)), self.source, 1)
        return {"image": scenes.images[0], "prefix": PROMPT, "suffix": str(sum(scenes.digits(0)))}


def score(predictor: Predictor, rows: int = 500) -> float:
    """The share of right answers."""
    sums = Sums(rows, held_out=True)
    asked = [sums[i] for i in range(rows)]
    answers = predictor.generate([row["image"] for row in asked], [PROMPT] * rows, 8, batch_size=100)
    return float(np.mean([answer == row["suffix"] for answer, row in zip(answers, asked)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train", default="lora")
    parser.add_argument("--quantize")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    config = FinetuneConfig(
        data="", output=args.output, resume=args.resume, model=args.model, train=args.train, quantize=args.quantize, lora_rank=args.rank,
        lora_alpha=2.0 * args.rank, steps=args.steps, batch_size=32, learning_rate=args.learning_rate, save_every=200,
    )  # fmt: skip
    check_run_folder(config)
    print(f"before: {score(load(args.model)):.1%}")
    print(f"after: {score(load(finetune(config, Sums(config.batch_size * args.steps)), quantize=args.quantize)):.1%}")


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
