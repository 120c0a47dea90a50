"""Other objectives of a run than the suffixes of its rows (see `reinforcement`)."""

from __future__ import annotations

from typing import Any, Protocol

from jax import Array
from jaxtyping import PyTree

from paligemma_jax.data.rows import RowSource
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import Trainer, TrainState


class Objective(Protocol):
    """What a run learns from."""

    def settings(self) -> dict[str, Any]:
        """The options as JSON values. A run is resumed with the same."""
        ...

    def check(self, config: FinetuneConfig, rows: RowSource) -> None:
        """Raise a ValueError if options or rows do not fit. Called before anything is written."""
        ...

    def loss(self, model: Any, batch: Any, max_targets: int, /) -> tuple[Array, Array]:
        """The sum of the losses of a batch and its divisor, as `Trainer` takes them."""
        ...

    def start(
        self, trainer: Trainer, state: TrainState, processor: Processor, rows: RowSource
    ) -> Rollouts:
        """Make the batches of a run whose first state is `state`."""
        ...


class Rollouts(Protocol):
    """Batches that depend on the parameters."""

    def draw(self, step: int) -> Any:
        """What a step, counted from 0, needs of the rows. Called ahead of time, in threads."""
        ...

    def batch(self, drawn: Any, state: TrainState, /) -> tuple[PyTree, dict[str, float]]:
        """The batch of a step, and measures for its line in the log."""
        ...

    def validate(self, state: TrainState, rows: RowSource) -> dict[str, float]:
        """Measures of held-out rows, with "validation_loss"."""
        ...
