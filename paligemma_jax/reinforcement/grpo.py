"""Group relative policy optimization (GRPO, arXiv:2402.03300) as the objective of a run."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from paligemma_jax.data.rows import RowSource, example_at
from paligemma_jax.losses.grpo import grpo
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Processor
from paligemma_jax.reinforcement.config import GRPOConfig
from paligemma_jax.reinforcement.groups import Groups, answer_log_probabilities
from paligemma_jax.reinforcement.rewards import resolve_reward, score_answer
from paligemma_jax.reinforcement.rollouts import GroupRollouts
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.ranges import flag
from paligemma_jax.training.trainer import Trainer, TrainState


@dataclass(frozen=True)
class GRPO(GRPOConfig):
    """Learn from rewards of sampled answers: `finetune(..., objective=GRPO("box_ap"))`.

    Each step samples `group` answers to every prompt of the batch, and makes those more likely that
    have a higher reward than the others of their group. The fields are those of `GRPOConfig`.
    """

    def check(self, config: FinetuneConfig, rows: RowSource) -> None:
        """Check that the rows have what the reward needs, and that the options fit together.

        Of a source that is no list, only the first row is checked, because an access may be slow.

        Raises:
            ValueError: They do not.
        """
        if config.features:
            raise ValueError(
                "--features cannot be combined with --objective grpo, which encodes images itself"
            )
        for name in ("dropout", "lora_dropout"):
            rate = getattr(config, name)
            if rate:
                raise ValueError(
                    f"{flag(name)} must be 0 with --objective grpo, which samples answers without "
                    f"dropout, got {rate}"
                )
        for name in ("box_order", "noise_boxes"):
            value = getattr(config, name)
            if value != getattr(FinetuneConfig, name):
                raise ValueError(
                    f"{flag(name)} must be left out with --objective grpo, which trains on sampled "
                    f"answers, got {value}"
                )
        reward = resolve_reward(self.reward)
        for i in range(len(rows) if isinstance(rows, list) else 1):
            example = example_at(rows, i)
            score_answer(reward, example.suffix, example)

    def loss(self, model: PaliGemma, batch: Groups, max_targets: int) -> tuple[Array, Array]:
        """The sum of the losses of the answers, and their number, as `Trainer` takes them."""
        return grpo_loss(model, batch, self.ratio_clip, self.kl)

    def start(
        self, trainer: Trainer, state: TrainState, processor: Processor, rows: RowSource
    ) -> GroupRollouts:
        """Make the batches of a run whose first state is `state`."""
        return GroupRollouts.create(self, trainer, state, processor, rows)


def grpo_loss(model: PaliGemma, groups: Groups, clip: float, kl: float) -> tuple[Array, Array]:
    """The sum of the losses of the answers, and their number, as `Trainer` takes them."""
    log_probabilities, mask = answer_log_probabilities(model, groups)
    old, reference = groups.log_probabilities, groups.reference
    loss, _ = grpo(log_probabilities, old, reference, groups.advantages, mask, clip, kl)
    count = jnp.float32(len(mask))
    return loss * count, count
