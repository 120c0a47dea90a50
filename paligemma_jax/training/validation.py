"""Validation during a run: the loss on held-out rows, and sample answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from paligemma_jax.data.rows import RowSource, example_at
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.sharding.arrays import shard_batch
from paligemma_jax.training.batches import Batcher, max_targets
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.runs import LogLine, Run
from paligemma_jax.training.trainer import Trainer, TrainState


@dataclass(frozen=True)
class Validation:
    """Validates a run on `rows`, if there are any."""

    trainer: Trainer
    run: Run
    checkpoints: Checkpoints
    batcher: Batcher
    rows: RowSource

    def is_due(self, step: int, last: bool) -> bool:
        every = self.trainer.config.validate_every
        return len(self.rows) > 0 and (last or (every > 0 and step % every == 0))

    def __call__(self, state: TrainState, line: LogLine) -> None:
        """Add "validation_loss" to the log line of a step, and answers to samples.jsonl."""
        with self._saving_on_error(state, line):
            line["validation_loss"] = self.loss(state)
            self._log_samples(state)

    def loss(self, state: TrainState) -> float:
        """The mean loss over all rows, without augmentation, in the run's reduction."""
        trainer, total, count = self.trainer, 0.0, 0.0
        trainable = state.average or state.trainable
        for batch in self.batcher.in_order(self.rows):
            placed = shard_batch(batch, trainer.mesh)
            loss, divisor = trainer.losses(
                trainable, trainer.frozen, placed, max_targets=max_targets(batch)
            )
            total, count = total + float(loss), count + float(divisor)
        return total / max(count, 1e-9)

    def _log_samples(self, state: TrainState) -> None:
        """Log answers to the first rows."""
        count = min(self.trainer.config.samples, len(self.rows))
        if not count:
            return
        examples = [example_at(self.rows, i) for i in range(count)]
        images = [list(example.images) for example in examples]
        prompts = [example.prefix for example in examples]
        processor = self.batcher.processor
        longest = max(len(row.prompt) for row in processor.encode(images, prompts))
        limit = min(64, processor.context - longest)
        predictor = Predictor(self.trainer.result(state), processor)
        answers = predictor.answers(images, prompts, limit, progress=False)
        for example, answer in zip(examples, answers, strict=True):
            sample = {"step": int(state.step), "prefix": example.prefix, "suffix": example.suffix}
            self.run.log(sample | {"answer": answer.text}, "samples.jsonl")

    @contextmanager
    def _saving_on_error(self, state: TrainState, line: LogLine) -> Iterator[None]:
        """Save a checkpoint if validation fails, so that no steps are lost. Not done in a
        multi-process run: processes save together, and not all of them may have failed."""
        try:
            yield
        except Exception:
            if jax.process_count() == 1:
                self.run.log(line)
                self.checkpoints.save(line["step"], state, line.get("validation_loss"))
                self.checkpoints.finish()
                self.run.close()
            raise
