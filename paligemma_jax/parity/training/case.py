"""A training run for two programs: weights, settings, and the rows of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.checkpoints.synthetic import with_depth
from paligemma_jax.data.rows import Example, read_examples
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig
from paligemma_jax.parity.case import (
    RANDOM_PRESETS,
    ParityCase,
    open_dense,
    random_case,
    reference_source,
)
from paligemma_jax.parity.torch_processor import TorchProcessor
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.batches import Batch, row_order
from paligemma_jax.training.config import FinetuneConfig

MAX_ROWS = 512  # all of them are in memory
RANDOM_ROWS, RANDOM_PROMPT, RANDOM_SUFFIX = 64, 8, 6  # rows, and tokens of each
DEFAULTS = FinetuneConfig(
    data="", output="", batch_size=4, learning_rate=1e-4, weight_decay=0.01, layers="list"
)
# Settings of a run that a comparison leaves out: both programs would draw other random numbers, or
# would not get the same pixels.
LEFT_OUT = {"dropout": 0.0, "lora_dropout": 0.0, "flip": 0.0, "crop": 1.0, "color": 0.0}
UNSUPPORTED = ("quantize", "soft_prompt", "ema", "features", "box_order", "noise_boxes")


@dataclass(frozen=True)
class TrainingCase:
    """Everything that decides a training run.

    `config.seed` decides the order of the rows and the initial adapter.
    """

    weights: ParityCase  # its inputs are the rows; images have the axes [N, n, S, S, 3]
    config: FinetuneConfig
    steps: int
    row_weights: np.ndarray  # float32[N]

    def batch(self, step: int) -> Batch:
        """The rows of a step, counted from 0, in the order of `finetune`."""
        size, rows = self.config.batch_size, self.weights.inputs
        order = row_order(len(rows.tokens), self.config.seed, step * size, size)
        arrays = {name: x if x is None else x[order] for name, x in vars(rows).items()}
        return Batch(Inputs(**arrays), self.row_weights[order])

    @property
    def max_targets(self) -> int:
        """The largest number of targets in a row."""
        return int(self.weights.inputs.targets.sum(axis=1).max())


def training_case(weights: ParityCase, config: FinetuneConfig, steps: int) -> TrainingCase:
    """A case on rows that exist already, of weight 1, one image each."""
    rows = weights.inputs
    images = (
        None
        if rows.images is None
        else rows.images.reshape(len(rows.tokens), -1, *rows.images.shape[-3:])
    )
    return TrainingCase(
        replace(weights, inputs=replace(rows, images=images)),
        comparable(config),
        steps,
        np.ones(len(rows.tokens), np.float32),
    )


def comparable(config: FinetuneConfig) -> FinetuneConfig:
    """The settings of a run without what two programs cannot share.

    Raises:
        ValueError: It trains something that is not compared.
    """
    for name in UNSUPPORTED:
        value = getattr(config, name)
        if value != getattr(FinetuneConfig, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"--train cannot compare runs with {option}, got {value}")
    if config.optimizer != "adamw":
        raise ValueError(f"--train compares AdamW only, got --optimizer {config.optimizer}")
    return replace(config, mesh=None, hosts=None, attention=None, **LEFT_OUT)


def load_training_case(
    model: str, config: FinetuneConfig, steps: int, data: str | None, depth: int | None = None
) -> TrainingCase:
    """The case of a checkpoint and a data set, or of a preset with random weights and rows.

    Args:
        model: A checkpoint, or a preset.
        data: Rows to train on, JSONL; the first `MAX_ROWS` are used.

    Raises:
        ValueError: The arguments do not fit together, or a file cannot be used.
    """
    config = comparable(config)
    if model in RANDOM_PRESETS:
        if data:
            raise ValueError(f"{model} has random weights and no tokenizer: leave out --data")
        preset = replace(PRESETS[model], numerics=config.numerics or "transformers")
        return training_case(
            random_rows(with_depth(preset, depth) if depth else preset), config, steps
        )
    if depth:
        raise ValueError(f"--depth needs a preset with random weights; {model} is a checkpoint")
    source = resolve(model, RANDOM_PRESETS)
    if data is None:
        raise ValueError(f"--train needs --data or --run to train {model}")
    return _from_rows(source, config, steps, read_examples(data, limit=MAX_ROWS))


def random_rows(config: PaliGemmaConfig, rows: int = RANDOM_ROWS, seed: int = 0) -> ParityCase:
    """Random weights, and rows of random pixels and tokens."""
    one = random_case(config, RANDOM_PROMPT, RANDOM_SUFFIX, seed)
    many = [random_case(config, RANDOM_PROMPT, RANDOM_SUFFIX, seed + i).inputs for i in range(rows)]
    arrays = {
        name: np.concatenate([np.asarray(getattr(row, name)) for row in many])
        for name in vars(one.inputs)
    }
    return replace(one, inputs=Inputs(**arrays))


def _from_rows(
    source: CheckpointSource, config: FinetuneConfig, steps: int, examples: Sequence[Example]
) -> TrainingCase:
    counts = {len(example.images) for example in examples}
    if len(counts) > 1:
        raise ValueError(f"--train needs as many images in each row, got {sorted(counts)}")
    reference = reference_source(source, None)
    processor = TorchProcessor.load((reference or source).tokenizer_dir, source.config.vision)
    images = [str(image) for example in examples for image in example.images]
    texts = [example.prefix for example in examples], [example.suffix for example in examples]
    rows = processor(images, *texts)
    checkpoint = open_dense(source).with_numerics(config.numerics)
    case = ParityCase(checkpoint, rows, rows, reference, source.tokenizer_dir)
    weights = np.array([example.weight for example in examples], np.float32)
    return replace(training_case(case, config, steps), row_weights=weights)
