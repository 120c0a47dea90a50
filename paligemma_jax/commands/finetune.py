"""`paligemma-jax finetune`."""

from __future__ import annotations

from typing import Annotated

import tyro

from paligemma_jax.training.config import FinetuneConfig


def finetune(config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune on images and texts. An interrupted run continues with --resume.

    Example: paligemma-jax finetune --data train.jsonl --output run --steps 1000
    """
    from paligemma_jax.sharding import hosts
    from paligemma_jax.training.finetune import finetune

    folder = finetune(config)
    if hosts.is_first_process():
        print(folder)
