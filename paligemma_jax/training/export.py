"""The result of a run: a model, or a LoRA adapter."""

from __future__ import annotations

import re
import shutil
import sys
from functools import partial
from pathlib import Path

from convert import peft
from convert.adapter import Adapter
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.runs import ADDED, BEST
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.model.patterns import matches
from paligemma_jax.model.prefix import prefix_of
from paligemma_jax.model.stack import unstack_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.sharding import hosts
from paligemma_jax.sharding.arrays import distribute, to_host
from paligemma_jax.training.adapters import base_name
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.trainer import Trainer, TrainState


def save_result(
    trainer: Trainer, state: TrainState, source: CheckpointSource, folder: Path
) -> Path:
    """Save the trained model in `folder`, and return its directory.

    If only LoRA, `modules_to_save` and a soft prompt, or a prefix, were trained, this is adapter/.
    It has what the adapter had from which a soft prompt was trained further. A model/ is saved
    otherwise, or if an export format is configured, with adapters merged into the unquantized base.
    """
    config, model = trainer.config, trainer.result(state)
    model = unstack_model(model) if config.layers == "stack" else model
    factors = lora.lora_factors(model)
    is_saved = partial(matches, config.saved_pattern)
    prompt = None if model.soft_prompt is None else to_host(model.soft_prompt[...])
    prefix = prefix_of(model)
    prefix = None if prefix is None else to_host(prefix)
    added = [path for path in trainer.trainable if re.fullmatch(ADDED, path)]
    if added and all(path in added or is_saved(path) for path in trainer.trainable):
        saved = {p: to_host(value) for p, value in parameters(model).items() if is_saved(p)}
        if hosts.is_first_process():
            before = source.delta or Adapter({})
            saved = {path: x.numpy() for path, x in before.parameters.items()} | saved
            kept, base = before.factors | factors, base_name(config, source)
            peft.save_adapter(folder / "adapter", kept, model.config, base, saved, prompt, prefix)
        hosts.barrier("adapter")
        if config.export is None:
            return folder / "adapter"
    if factors:
        # An adapted kernel that was trained too has the path of the base in LoRA.
        trained = {path.replace("/base/", "/"): x for path, x in parameters(model).items()}
        base_model = load_model(source, model.config.dtype, config.numerics, trainer.mesh)
        untrained = parameters(base_model)
        model = with_parameters(base_model, lambda path: trained.get(path, untrained[path]))
        model = lora.merge_lora(distribute(lora.attach_lora(model, factors), trainer.mesh))
    export = config.export or "jax"
    save_model(folder / "model", model, like=source, to=export, force=True)
    return folder / "model"


def save_best(
    trainer: Trainer,
    state: TrainState,
    checkpoints: Checkpoints,
    source: CheckpointSource,
    folder: Path,
) -> None:
    """Save the best checkpoint on validation in `folder`/best, unless it is the last one.

    Args:
        state: The last state.
    """
    best = checkpoints.best_step()
    hosts.barrier("best")
    if hosts.is_first_process():  # of an earlier end of the run
        shutil.rmtree(folder / BEST, ignore_errors=True)
    if best is None or best == int(state.step):
        return
    if hosts.is_first_process():
        (folder / BEST).mkdir()
    hosts.barrier("best directory")
    result = save_result(trainer, checkpoints.load(best, state), source, folder / BEST)
    if hosts.is_first_process():
        measured = checkpoints.criterion.describe(checkpoints.metrics(best).best)
        print(f"best on validation: step {best}, {measured}: {result}", file=sys.stderr)
