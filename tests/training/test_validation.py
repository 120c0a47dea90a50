"""Validation during a run: which weights the metrics are of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.finetuning import read_log, small_config

import paligemma_jax as pg


@pytest.mark.thorough
def test_metrics_and_best_are_of_the_averaged_weights(data, tmp_path):
    """Each metric is that of the averaged weights of its step, which answer otherwise than the
    trained ones; best/ has those of the step with the highest."""
    seen, trained = [], []

    def characters(answers, references):
        seen.append(list(answers))
        return sum(map(len, answers)) / len(answers)

    def answer_as_trained(event):
        model = event.trainer.merge(event.state.trainable, event.trainer.frozen)
        trained.append(answers_of(pg.Predictor(model, processor)))

    rows = [json.loads(line) for line in data.read_text().splitlines()][:4]
    images = [data.parent / row["image"] for row in rows]
    processor = pg.load("tiny").processor

    def answers_of(predictor):
        return predictor.generate(images, ["ocr"] * 4, max_new_tokens=64)

    options = dict(steps=3, keep=3, validate_every=1, ema=0.8, learning_rate=3e-3, warmup=0)
    config = small_config(data, tmp_path / "run", train="projector", schedule="constant", **options)
    rows = [row | {"image": str(image)} for row, image in zip(rows, images, strict=True)]
    functions = dict(metrics=[characters], callbacks=[answer_as_trained])
    pg.finetune(config, data=rows, validation=rows, **functions)
    averaged = seen[1:]  # the first are the references
    assert len(averaged) == 3
    assert all(a != b for a, b in zip(averaged, trained, strict=True))
    for step, answers in enumerate(averaged, 1):
        assert answers_of(pg.load(tmp_path / f"run/checkpoints/{step}")) == answers
    samples = [line["answer"] for line in read_log(tmp_path / "run", "samples.jsonl")]
    assert samples == sum(averaged, [])
    scores = [line["validation_characters"] for line in read_log(tmp_path / "run")]
    best = int(np.argmax(scores))
    assert best != 2 and (tmp_path / "run/best").is_dir()
    assert answers_of(pg.load(tmp_path / "run")) == averaged[best]
