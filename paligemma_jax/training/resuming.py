"""What may change between the parts of a run."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint.utils import tuple_path_from_keypath

from convert.orbax import open_tree
from paligemma_jax.checkpoints.runs import CHECKPOINTS, STATE, checkpoint_steps
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.optimizers import make_schedule
from paligemma_jax.training.trainer import TrainState


def check_same_optimizer(folder: Path, state: TrainState) -> None:
    """Check that the checkpoints of a run have the optimizer state of `state`.

    Called before they are restored, because a state of another structure cannot be told from a
    damaged one. Only arrays are compared: rates and decays may change.

    Raises:
        ValueError: The names or shapes of the arrays differ.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return
    try:
        saved = open_tree(folder / CHECKPOINTS / str(steps[-1]) / STATE)
    except (ValueError, OSError):  # damaged, as `Checkpoints.restore` will say
        return
    before = {path: tensor.shape for path, tensor in saved.items() if path[0] == "optimizer"}
    leaves = jax.tree_util.tree_flatten_with_path({"optimizer": state.optimizer})[0]
    now = {tuple_path_from_keypath(path): leaf.shape for path, leaf in leaves}
    for own, other, name in ((before, now, "its state has"), (now, before, "its state lacks")):
        for path, shape in own.items():
            if other.get(path) != shape:
                listed = f"{'/'.join(path[1:])} of shape {shape}"
                raise ValueError(
                    f"{folder} was started with another optimizer: {name} {listed}. Resume with "
                    "the same optimizer"
                )


def warn_of_longer_schedule(
    config: FinetuneConfig, before: int | None, now: int, step: int
) -> None:
    """Say what changes if a run resumes for more steps than it was started for."""
    if before is None or before == now:
        return
    old, new = (np.asarray(make_schedule(config, steps)(step)) for steps in (before, now))
    warnings.warn(
        f"the run goes on to step {now} instead of {before}, and so does its {config.schedule} "
        f"schedule: the learning rate of step {step + 1} is {new:.3g} instead of {old:.3g}",
        stacklevel=3,
    )
