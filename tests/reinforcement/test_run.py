"""Runs of `finetune --objective grpo`: they learn, resume, and refuse what does not fit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.finetuning import assert_equal, read_log, weights

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.model.tree import parameters
from paligemma_jax.reinforcement.grpo import GRPO
from paligemma_jax.reinforcement.rollouts import GroupRollouts, score_groups
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Trainer

RNG = np.random.default_rng(0)
ROWS = [
    {"image": RNG.integers(0, 255, (56, 56, 3), np.uint8), "prefix": "ocr", "suffix": str(i)}
    for i in range(4)
]


def even_digits(answer, example):
    """The fraction of even digits: a bandit whose best arm is soon found."""
    return float(np.mean([digit in "02468" for digit in answer if digit.isdigit()] or [0]))


def config_of(folder, **options):
    train = "projector/.*|decoder/layers/.*norm/.*"
    defaults = dict(batch_size=2, steps=4, learning_rate=1e-2, warmup=0, train=train, samples=0)
    return FinetuneConfig("", str(folder), **(defaults | options))


OBJECTIVE = GRPO(even_digits, group=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finetune(config_of(folder), ROWS, ROWS[:2], objective=OBJECTIVE)
    return folder


def test_rewards_rise(run):
    log = read_log(run)
    assert log[0]["reward"] < 0.5 < 0.8 < log[-1]["validation_reward"]
    assert log[-1]["validation_loss"] == 1 - log[-1]["validation_reward"]
    assert log[0]["kl"] < 1e-5 < log[-1]["kl"]
    assert all(line["answer_tokens"] <= 6 for line in log)


def test_an_interrupted_run_resumes_bit_for_bit(run, tmp_path):
    config, scored = config_of(tmp_path / "run"), []

    def interrupting(answer, example):
        scored.append(answer)
        if len(scored) == len(ROWS) + 3:  # after the check of the rows, in the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return even_digits(answer, example)

    interrupting.__qualname__ = even_digits.__qualname__
    finetune(config, ROWS, ROWS[:2], objective=replace(OBJECTIVE, reward=interrupting))
    assert len(read_log(tmp_path / "run")) == 1
    with pytest.raises(ValueError, match=r"group was 4, now 8\. Resume with the same objective"):
        finetune(
            replace(config, resume=True), ROWS, ROWS[:2], objective=replace(OBJECTIVE, group=8)
        )
    finetune(replace(config, resume=True), ROWS, ROWS[:2], objective=OBJECTIVE)
    assert_equal(weights(run / "model"), weights(tmp_path / "run/model"))
    rewards = [[line["reward"] for line in read_log(f)] for f in (run, tmp_path / "run")]
    assert rewards[0] == rewards[1]


def test_the_reference_of_lora_is_the_model_without_the_adapter():
    config = config_of("", train="lora", lora_rank=2)
    model = load_model(TINY, "float32")
    trainer = Trainer(prepare_model(model, config), config, 4, OBJECTIVE.loss)
    state = trainer.start()
    processor = pg.load("tiny").processor
    rollouts = GroupRollouts.create(OBJECTIVE, trainer, state, processor, ROWS)
    assert sum(x.nbytes for x in rollouts.initial.values()) < 0.1 * sum(
        x.nbytes for x in parameters(model).values()
    )
    moved = {path: value + 0.1 for path, value in state.trainable.items()}
    groups, measures = rollouts.batch(rollouts.draw(0), replace(state, trainable=moved))
    base, _ = score_groups(model, groups)
    np.testing.assert_allclose(groups.reference, base, atol=1e-5)
    assert np.abs(groups.reference - groups.log_probabilities).max() > 0.1 and measures["kl"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reward", "box_ap"], "--reward requires --objective grpo, got --objective suffixes"),
        (["--objective", "grpo", "--reward", "box"], "reward must be one of exact, iou, box_ap"),
        (["--objective", "grpo", "--group", "1"], "--group must be an integer of at least 2"),
        (["--objective", "grpo", "--kl", "-1"], "--kl must be at least 0 and finite, got -1.0"),
        (["--objective", "grpo", "--reward", "iou"], "row 1: rewards of boxes require a suffix"),
        (
            ["--objective", "grpo", "--noise-boxes", "9"],
            "--noise-boxes must be left out with --objective grpo",
        ),
        (["--objective", "grpo", "--dropout", "0.1"], "--dropout must be 0 with --objective grpo"),
        (
            ["--objective", "grpo", "--numerics", "big_vision"],
            "--objective grpo requires --numerics transformers",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments, message, data, tmp_path, command):
    base = ["--data", data, "--output", tmp_path / "run", "--batch-size", 4]
    code, _, err = command("finetune", *base, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
