"""The batches of a reinforcement run: sampled answers, scored and compared within their group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.data.rows import Example, RowSource, example_at
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.losses.grpo import group_advantages
from paligemma_jax.processing.processor import EncodedPrompt, Processor
from paligemma_jax.reinforcement.config import GRPOConfig
from paligemma_jax.reinforcement.groups import Groups, answer_log_probabilities, sample_groups
from paligemma_jax.reinforcement.rewards import resolve_reward, score_answer
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit
from paligemma_jax.training.batches import training_examples
from paligemma_jax.training.trainer import Parameters, Trainer, TrainState

score_groups = mesh_jit(answer_log_probabilities)


@dataclass(frozen=True)
class Prompts:
    """The rows of a step before anything is sampled."""

    step: int
    examples: list[Example]
    encoded: list[EncodedPrompt]
    images: np.ndarray  # float32[B, n, S, S, 3]


@dataclass(frozen=True)
class GroupRollouts:
    """Draws the rows of each step, samples answers to them, and scores these.

    A batch depends on the seed, the step and the parameters only, so that a resumed run continues
    as if it had not been interrupted.
    """

    options: GRPOConfig
    trainer: Trainer
    processor: Processor
    rows: RowSource
    initial: Parameters | None  # trainable parameters of the reference

    @classmethod
    def create(
        cls,
        options: GRPOConfig,
        trainer: Trainer,
        state: TrainState,
        processor: Processor,
        rows: RowSource,
    ) -> GroupRollouts:
        """Make the rollouts of a run whose first state is `state`.

        The reference differs from the model in the trainable parameters only, so only their first
        values are copied. With LoRA these are the two factors of each layer, whose product is 0:
        the reference is the base model, of which there is no second copy.
        """
        if (
            trainer.model.config.profile.capped_prefill
            != trainer.model.config.profile.capped_decode
        ):
            raise ValueError(
                "--objective grpo requires --numerics transformers: with big_vision, sampling "
                "caps logits that training does not"
            )
        initial = jax.tree.map(jnp.copy, state.trainable) if options.kl else None
        return cls(options, trainer, processor, rows, initial)

    def draw(self, step: int) -> Prompts:
        """Draw and encode the rows of a step, counted from 0."""
        examples = training_examples(self.trainer.config, self.processor, self.rows, step)
        texts = [example.prefix for example in examples]
        encoded = self.processor.encode([list(example.images) for example in examples], texts)
        counts = {len(prompt.images) for prompt in encoded}
        if len(counts) > 1:
            lines = [example.line for example in examples]
            raise ValueError(
                f"rows {lines} must have the same number of images for --objective grpo, "
                f"got {sorted(counts)}"
            )
        images = self.processor.pixel_values([x for prompt in encoded for x in prompt.images])
        images = images.reshape(len(encoded), -1, *images.shape[1:])
        return Prompts(step, examples, encoded, images)

    def batch(self, prompts: Prompts, state: TrainState) -> tuple[Groups, dict[str, float]]:
        """Sample and score answers. Returns them with measures for the log."""
        group, rows = self.options.group, len(prompts.examples)
        seeds = np.random.default_rng((self.trainer.config.seed, prompts.step))
        groups, answers = sample_groups(
            self.trainer.merge(state.trainable, self.trainer.frozen),
            self.processor,
            prompts.encoded,
            prompts.images,
            group,
            self.options.max_new_tokens,
            seeds.integers(2**31, size=rows),
        )
        rewards = self._score(answers, np.repeat(np.arange(rows), group), prompts.examples)
        rewards = rewards.reshape(rows, group)
        weights = np.array([example.weight for example in prompts.examples], np.float32)
        advantages = group_advantages(rewards, self.options.std) * weights[:, None]
        groups = replace(groups, advantages=advantages.reshape(-1))
        measures = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(axis=1).mean()),
            "answer_tokens": float(groups.inputs.targets.sum(axis=1).mean()),
        }
        if self.initial is None:
            return groups, measures
        reference = self.trainer.merge(self.initial, self.trainer.frozen)
        scored, mask = map(to_host, score_groups(reference, groups))
        difference = np.where(mask, scored - groups.log_probabilities, 0)
        divergence = (np.exp(difference) - difference - 1).sum() / mask.sum()
        return replace(groups, reference=scored), {**measures, "kl": float(divergence)}

    def validate(self, state: TrainState, rows: RowSource) -> dict[str, float]:
        """The mean reward of the most likely answers to validation rows."""
        examples = [example_at(rows, i) for i in range(len(rows))]
        predictor = Predictor(self.trainer.result(state), self.processor)
        images = [list(example.images) for example in examples]
        prompts = [example.prefix for example in examples]
        answers = predictor.generate(images, prompts, self.options.max_new_tokens, progress=False)
        reward = float(self._score(answers, np.arange(len(rows)), examples).mean())
        return {"validation_reward": reward, "validation_loss": 1 - reward}

    def _score(
        self, answers: Sequence[str], numbers: np.ndarray, examples: Sequence[Example]
    ) -> np.ndarray:
        """float64[R]: the reward of each answer to the example of its number."""
        reward = resolve_reward(self.options.reward)
        pairs = zip(answers, numbers, strict=True)
        return np.array([score_answer(reward, answer, examples[i]) for answer, i in pairs])
