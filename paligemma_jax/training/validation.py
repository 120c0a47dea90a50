"""Validation during a run: the loss on held-out rows, metrics of answers, and sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paligemma_jax.data.rows import Example, RowSource, example_at
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.sharding.arrays import shard_batch
from paligemma_jax.training.batches import Batcher, max_targets
from paligemma_jax.training.measures import Measure, make_case
from paligemma_jax.training.objective import Rollouts
from paligemma_jax.training.runs import LogLine, Run
from paligemma_jax.training.trainer import Trainer, TrainState

ANSWER = 64  # tokens that an answer may have, or as many as the longest suffix of the rows


@dataclass(frozen=True)
class Validation:
    """Validates a run on `rows`, if there are any."""

    trainer: Trainer
    run: Run
    batcher: Batcher
    rows: RowSource
    measures: Sequence[Measure] = ()
    rollouts: Rollouts | None = None  # of another objective than the suffixes

    def is_due(self, step: int, last: bool) -> bool:
        every = self.trainer.config.validate_every
        return len(self.rows) > 0 and (last or (every > 0 and step % every == 0))

    def __call__(self, state: TrainState, line: LogLine) -> None:
        """Add "validation_loss" and the metrics to the log line of a step, and answers to
        samples.jsonl."""
        if self.rollouts:
            line |= self.rollouts.validate(state, self.rows)
        else:
            line["validation_loss"] = self.loss(state)
        samples = min(self.trainer.config.samples, len(self.rows))
        count = len(self.rows) if self.measures else samples
        if not count:
            return
        examples = [example_at(self.rows, i) for i in range(count)]
        answers = self._answers(state, examples)
        self._log_samples(int(state.step), examples[:samples], answers)
        tokenizer = self.batcher.processor.tokenizer
        cases = [
            make_case(example, answer.text, list(answer.pieces(tokenizer)))
            for example, answer in zip(examples, answers, strict=True)
        ]
        for measure in self.measures:
            line[measure.name] = measure(cases)

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

    def _answers(self, state: TrainState, examples: Sequence[Example]) -> list[Answer]:
        """Greedy answers by the present parameters, which are not copied."""
        images = [list(example.images) for example in examples]
        prompts = [example.prefix for example in examples]
        processor = self.batcher.processor
        rows = processor.encode(images, prompts, [example.suffix for example in examples])
        longest = max(len(row.prompt) for row in rows)
        limit = max(ANSWER, *(len(row) - len(row.prompt) for row in rows))
        predictor = Predictor(self.trainer.result(state), processor)
        return predictor.answers(
            images, prompts, min(limit, processor.context - longest), progress=False
        )

    def _log_samples(
        self, step: int, examples: Sequence[Example], answers: Sequence[Answer]
    ) -> None:
        for example, answer in zip(examples, answers, strict=False):
            sample = {"step": step, "prefix": example.prefix, "suffix": example.suffix}
            self.run.log(sample | {"answer": answer.text}, "samples.jsonl")
