"""Functions of the user that are called after each step of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import PyTree

from paligemma_jax.training.trainer import Trainer, TrainState


@dataclass(frozen=True)
class StepEvent:
    """A finished step, as callbacks receive it."""

    step: int  # counted from 1
    steps: int  # of the run
    report: Mapping[str, Any]  # its line of log.jsonl: "loss", "gradient_norm", "tokens_s", ...
    state: TrainState  # valid during the callback only: the next step reuses its memory
    trainer: Trainer

    @property
    def is_validated(self) -> bool:
        """Whether `report` has "validation_loss", and the metrics of the run."""
        return "validation_loss" in self.report

    def model(self) -> PyTree:
        """The model after the step, with averaged parameters if there are any; not a copy."""
        return self.trainer.result(self.state)


# Called after each step; True ends the run as if this step were its last.
Callback = Callable[[StepEvent], bool | None]


def run_callbacks(callbacks: Sequence[Callback], event: StepEvent) -> bool:
    """Call all callbacks. Returns whether one of them ends the run.

    Raises:
        ValueError: One returns something else than None or a bool.
    """
    stop = False
    for callback in callbacks:
        result = callback(event)
        if result is not None and not isinstance(result, bool):
            raise ValueError(
                f"a callback must return None, or True to end the run, got {result!r} "
                f"from {getattr(callback, '__name__', callback)}"
            )
        stop |= bool(result)
    return stop


def check_callbacks(callbacks: object) -> None:
    """Raise ValueError unless it is a list of functions."""
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks must be a list of functions of a StepEvent, got {callbacks!r}")
