"""`paligemma-jax finetune`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Literal

import tyro

from paligemma_jax.reinforcement.config import GRPOConfig
from paligemma_jax.training.config import FinetuneConfig


def finetune(
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")],
    objective: Literal["suffixes", "grpo"] = "suffixes",
    grpo: Annotated[GRPOConfig, tyro.conf.arg(name="")] = GRPOConfig(),
    deterministic: bool = False,
) -> None:
    """Fine-tune on images and texts. An interrupted run continues with --resume.

    Example: paligemma-jax finetune --data train.jsonl --output run --steps 1000

    Args:
        objective: What to learn from: suffixes, the answers of the rows; or grpo, rewards of
            sampled answers (--reward, --group, --max-new-tokens, --ratio-clip, --kl, --std).
        deterministic: On GPUs, exclude kernels whose results vary between runs; slower. CPUs and
            TPUs need no flag.
    """
    default = GRPOConfig()
    names = [field.name for field in fields(GRPOConfig)]
    changed = [name for name in names if getattr(grpo, name) != getattr(default, name)]
    if objective != "grpo" and changed:
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--{flag} requires --objective grpo, got --objective {objective}")
    from paligemma_jax.reinforcement.grpo import GRPO
    from paligemma_jax.sharding import hosts
    from paligemma_jax.sharding.deterministic import require_deterministic_programs
    from paligemma_jax.training.finetune import finetune

    if deterministic:
        require_deterministic_programs()

    folder = finetune(config, objective=GRPO(**asdict(grpo)) if objective == "grpo" else None)
    if hosts.is_first_process():
        print(folder)
