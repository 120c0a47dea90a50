"""`paligemma-jax finetune`."""

from __future__ import annotations

from typing import Annotated

import tyro

from paligemma_jax.training.config import Finetune


def finetune(config: Annotated[Finetune, tyro.conf.arg(name="")]) -> None:
    """Fine-tune on images and texts; a stopped run continues with --resume.

    Example: paligemma-jax finetune --data train.jsonl --output run --steps 1000
    """
    from paligemma_jax.scaling import hosts
    from paligemma_jax.training.finetune import finetune

    folder = finetune(config)
    if hosts.first():
        print(folder)
