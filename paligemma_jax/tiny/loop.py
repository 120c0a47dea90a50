"""A plain training loop for the parts of `tiny` that `finetune` does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.training.batches import prefetch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import LossFunction, Trainer

Module = TypeVar("Module")
ArrayBatch = dict[str, np.ndarray]
MakeBatch = Callable[[int], ArrayBatch]  # takes the number of a step


def train_module(
    module: Module,
    config: FinetuneConfig,
    steps: int,
    loss: LossFunction,
    make_batch: MakeBatch,
    name: str,
) -> Module:
    """Train all parameters of a module.

    Args:
        config: Optimizer and learning rate.
        loss: As for `Trainer`.
        make_batch: Makes the batch of a step; called in threads, some steps ahead.
        name: Label of the progress bar.
    """
    trainer = Trainer(module, config, steps, loss=loss)
    state = trainer.start()
    makers: Iterator = (partial(make_batch, step) for step in range(steps))
    with progress_bar(total=steps, desc=name, unit="step") as bar:
        for batch in prefetch(makers):
            state, report = trainer.step(state, trainer.frozen, batch, max_targets=0)
            bar.set_postfix(loss=f"{float(report['loss']):.4f}", refresh=False)
            bar.update()
    return trainer.result(state)
