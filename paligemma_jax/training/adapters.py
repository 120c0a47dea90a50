"""What may be trained on top of an adapter, and on what an adapter is saved."""

from __future__ import annotations

from convert import peft
from convert.files import user_path
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.training.config import SOFT, FinetuneConfig


def check_adapter(config: FinetuneConfig, source: CheckpointSource) -> int:
    """Return the number of vectors of the run's soft prompt: its own or that of --model.

    Raises:
        ValueError: The run cannot start from `source`.
    """
    count, kind = 0, "soft prompt"
    if source.delta:
        count, kind = source.delta.soft_tokens, source.delta.soft_kind
    train = "prefix" if kind == "prefix" else "prompt"
    if count and config.train != train:
        raise ValueError(
            f"--model {config.model} has a {kind}, which can be trained further with --train "
            f"{train} only, got --train {config.train}; or give its base, {source.weights}"
        )
    if config.train == "prefix" and source.has_adapter and not count:
        raise ValueError(
            f"--train prefix requires --model without LoRA, since a prefix is saved alone, got "
            f"{config.model}: give its base, {source.weights}, or merge it first"
        )
    if config.lora and source.has_adapter:
        raise ValueError(
            f"--model {config.model} is a LoRA adapter and cannot get a second one: give its base, "
            f"{source.weights}, or train without LoRA to continue from both"
        )
    if count and config.soft_prompt not in (0, count):
        raise ValueError(
            f"--soft-prompt must be {count}, as --model {config.model} has it, or be left out, "
            f"got {config.soft_prompt}"
        )
    if config.train in SOFT and not (count or config.soft_prompt):
        what = "tokens" if config.train == "prefix" else "vectors"
        raise ValueError(f"--train {config.train} requires --soft-prompt, the number of its {what}")
    if source.state and (config.train in SOFT or (config.lora and not config.export)):
        way = "give the adapter of its run" if source.has_adapter else "convert it first"
        raise ValueError(
            f"--model {config.model} is a training state, which no adapter can have as its base: "
            f"{way}, or resume its run"
        )
    return count or config.soft_prompt


def base_name(config: FinetuneConfig, source: CheckpointSource) -> str:
    """The name of the base in the config of an adapter: a hub id, or an absolute path."""
    name = config.model
    if source.adapter:  # which is saved again, with the same base
        name = config.base or peft.base_checkpoint(source.adapter)
    if name == "tiny" or not user_path(name).exists():
        return name
    return str((source.state.directory if source.state else source.weights).resolve())
