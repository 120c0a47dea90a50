"""The result of a run: a model, or a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

from convert import peft
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.model.stack import unstack_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.sharding import hosts
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.training.trainer import Trainer, TrainState


def save_result(
    trainer: Trainer, state: TrainState, source: CheckpointSource, folder: Path
) -> Path:
    """Save the trained model in `folder`, and return its directory.

    If only LoRA was trained, this is adapter/. A model/ is saved otherwise, or if an export format
    is configured, with adapters merged into the unquantized base.
    """
    config, model = trainer.config, trainer.result(state)
    model = unstack_model(model) if config.layers == "stack" else model
    factors = lora.lora_factors(model)
    if factors and all("/lora_" in path for path in trainer.trainable):
        if hosts.is_first_process():
            is_local = config.model != "tiny" and Path(config.model).exists()
            base = str(Path(config.model).resolve()) if is_local else config.model
            peft.save_adapter(folder / "adapter", factors, model.config, base)
        hosts.barrier("adapter")
        if config.export is None:
            return folder / "adapter"
    if factors:
        trained = parameters(model)
        base_model = load_model(source, model.config.dtype, config.numerics, trainer.mesh)
        untrained = parameters(base_model)
        model = with_parameters(base_model, lambda path: trained.get(path, untrained[path]))
        model = lora.merge_lora(distribute(lora.attach_lora(model, factors), trainer.mesh))
    export = config.export or "jax"
    save_model(folder / "model", model, like=source, to=export, force=True)
    return folder / "model"
