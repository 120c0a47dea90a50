"""Runs from start to end: what the command writes, interruption, validation, errors."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.finetuning import assert_equal, losses, read_log, small_config, weights
from support.toys import TOY

import paligemma_jax as pg
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.data import progress
from paligemma_jax.data.rows import read_examples
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.image_settings import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training import runs
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.features import FeatureCache
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.prepare import load_trainable
from paligemma_jax.training.trainer import Trainer


def steps_of(folder):
    """The steps whose checkpoints are kept."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.thorough
def test_the_command_trains_and_exports_a_model(command, data, tmp_path):
    run = tmp_path / "run"
    options = ["--steps", 8, "--batch-size", 4, "--accumulate", 2, "--learning-rate", 1e-3]
    options += ["--save-every", 3, "--train", "decoder", "--export", "huggingface"]
    options += ["--data", data, "--validation", data, "--output", run]
    code, out, error = command("finetune", *options)
    assert code == 0, error
    assert out.strip() == str(run / "model")
    log = read_log(run)
    assert [line["step"] for line in log] == list(range(1, 9))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and "validation_loss" in log[-1]
    assert (run / "loss.png").stat().st_size > 1000
    assert json.loads((run / "config.json").read_text())["batch_size"] == 4
    assert len(steps_of(run)) == 2
    before, after = weights(TINY), weights(run / "model")
    for path in before:  # frozen parameters do not change by a single bit
        assert (before[path] == after[path]).all() != path.startswith("decoder/"), path
    assert isinstance(pg.load(run / "model").generate(data.parent / "3.png", "ocr"), list)


def test_a_stopped_run_continues_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    full, stopped, log = tmp_path / "full", tmp_path / "stopped", runs.Run.log
    config = small_config(data, full, steps=7, learning_rate=1e-3, save_every=2, ema=0.9)
    config = replace(config, dropout=0.1)
    finetune(config)

    def log_and_terminate(self, line):
        log(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(config, output=str(stopped))
    monkeypatch.setattr(runs.Run, "log", log_and_terminate)
    assert finetune(config) == stopped
    output = capsys.readouterr().out
    assert re.search("stopped after step [3-6]; continue with --resume", output)
    finetune(replace(config, resume=True))
    assert losses(stopped) == losses(full)
    assert_equal(weights(stopped / "model"), weights(full / "model"))
    with pytest.raises(ValueError, match="other settings: batch_size was 4, now 2"):
        finetune(replace(config, resume=True, batch_size=2))
    with pytest.raises(ValueError, match="is not empty"):
        finetune(config)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"train": "everything"}, "'everything' matches no parameter"),
        ({"tensorboard": True}, "--log tensorboard requires the train extra"),
        ({"train": "vision/.*", "features": "kept"}, "requires a frozen image encoder"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(data, tmp_path, monkeypatch, options, message):
    """The corrected command then finds an empty directory."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        finetune(small_config(data, "run", steps=1, **options))
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_twenty_kills(data, tmp_path):
    """Kill a run at random moments while it starts, trains or saves, and resume it each time. It
    ends with the weights of a run that was never killed."""
    command = [sys.executable, "-m", "paligemma_jax", "finetune", "--data", str(data)]
    command += ["--steps", "300", "--batch-size", "4", "--learning-rate", "1e-4"]
    command += ["--save-every", "5", "--length", "96", "--output"]
    settings = dict(env=os.environ | {"PALIGEMMA_JAX_CACHE": str(tmp_path / "cache")})
    run, rng, killed_at = tmp_path / "run", random.Random(0), []

    def resume():
        return [*command, str(run), *(["--resume"] if (run / "config.json").exists() else [])]

    def logged():
        file = run / "log.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    for _ in range(20):
        process, steps, fewest = subprocess.Popen(resume(), **settings), rng.randrange(12), logged()
        while logged() < fewest + steps and process.poll() is None:
            fewest = min(fewest, logged())  # lines after the last checkpoint are dropped
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if steps else rng.uniform(0, 8))
        assert process.poll() is None, f"the run ended by itself after kills at {killed_at}"
        process.kill()
        process.wait()
        killed_at.append(logged())
    assert max(killed_at) > 40 and len(set(killed_at)) > 10
    assert subprocess.run(resume(), check=False, **settings).returncode == 0
    full = tmp_path / "full"
    assert subprocess.run([*command, str(full)], check=False, **settings).returncode == 0
    assert steps_of(run) == [295, 300]
    assert_equal(weights(run / "model"), weights(full / "model"))
    assert losses(run) == losses(full)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    config = small_config(
        data,
        tmp_path / "run",
        steps=9,
        learning_rate=1e30,
        warmup=0,
        clip=0,
        optimizer="sgd",
        train="decoder",
        features=str(tmp_path / "kept"),
    )
    message = r"loss (nan|inf) and .* at step \d must be finite; its batch is saved in .*bad_batch"
    with pytest.raises(ValueError, match=message):
        finetune(config)
    (file,) = (tmp_path / "run").glob("bad_batch_*.npz")
    batch = np.load(file)
    assert batch["tokens"].shape[0] == batch["features"].shape[0] == 4


def test_a_failed_validation_loses_no_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma_jax.training.validation.Validation.loss", lambda *_: 1 / 0)
    run = tmp_path / "run"
    options = dict(validation=str(data), steps=3, train="projector", validate_every=2)
    with pytest.raises(ZeroDivisionError):
        finetune(small_config(data, run, **options))
    assert len(losses(run)) == 2 and steps_of(run) == [2]


@pytest.mark.parametrize(
    "rows,validation,message",
    [
        ([], None, "data has no rows"),
        (iter([{}]), None, "data must have a length"),
        (range(2**40), None, "do not repeat the data set"),
        ([{"weight": 0}] * 2, None, "data has no row with a weight above 0"),
        ([{"image": "no.png"}], None, "^row 0: no image file at no.png"),
        ([{}], [{}, {"image": "no.png"}], "^validation: row 1: no image file at no.png"),
        ([{}], [], "--validate-every 1 requires --validation"),
    ],
)
def test_unusable_rows_are_refused_before_anything_is_written(tmp_path, rows, validation, message):
    def complete(rows):
        image = np.zeros((8, 8, 3), np.uint8)
        default = {"image": image, "prefix": "ocr", "suffix": "1"}
        return [default | row for row in rows] if isinstance(rows, list) else rows

    every = 1 if validation == [] else 0
    config = small_config("", tmp_path / "run", steps=1, batch_size=2, validate_every=every)
    with pytest.raises(ValueError, match=message):
        finetune(config, complete(rows), complete(validation))
    assert not (tmp_path / "run").exists()


def test_an_empty_suffix_teaches_the_end_token(data, tmp_path):
    """It is a target as in transformers, whose processor appends eos to any suffix."""
    rows = [{"image": str(data.parent / "0.png"), "prefix": "ocr", "suffix": ""}] * 4
    config = small_config("", tmp_path / "run", steps=6, learning_rate=1e-2, train="projector")
    message = r"data: the suffix is empty in 4 of 4 rows, which train the model to answer with noth"
    with pytest.warns(UserWarning, match=message):
        finetune(config, rows)
    first, *_, last = losses(tmp_path / "run")
    assert last < first / 2


@pytest.mark.parametrize("train", ["projector/.*", "vision/.*", "decoder/norm/.*"])
def test_parameters_that_are_not_quantized_can_be_trained(train):
    load_trainable(FinetuneConfig("", "", train=train, quantize="nf4"), resolve("tiny"), None)


@pytest.mark.parametrize("dtype,expected", [(None, "bfloat16"), ("float32", "float32")])
def test_accelerators_compute_in_bfloat16_by_default(tmp_path, monkeypatch, dtype, expected):
    """They do so even from a float32 checkpoint. Trainable parameters are float32."""
    save_model(tmp_path / "float32", load_model(TINY, "float32"), like="tiny")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load_model(tmp_path / "float32").config.dtype == "float32"
    config = FinetuneConfig("", "", train="projector", dtype=dtype)
    model = load_trainable(config, resolve(tmp_path / "float32"), None)
    values = parameters(model).items()
    dtypes = {path.startswith("projector/"): value.dtype.name for path, value in values}
    assert model.config.dtype == expected and dtypes == {True: "float32", False: expected}


def test_cached_features_give_the_same_losses(data, tmp_path, monkeypatch):
    """A second run needs no images."""
    options = dict(steps=4, accumulate=2, learning_rate=1e-3, train="decoder")
    config = small_config(data, tmp_path / "plain", **options)
    finetune(config, validation=read_examples(data))
    cached = replace(config, output=str(tmp_path / "kept"), features=str(tmp_path / "features"))
    finetune(cached, validation=read_examples(data))
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "plain"), rtol=1e-5)
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 12
    monkeypatch.setattr(Processor, "pixel_values", None)
    finetune(replace(cached, output=str(tmp_path / "again")))


def test_features_are_cached_by_image_settings(tmp_path):
    model, processor = load_model(TINY), make_processor(resolve(TINY))
    stretched = replace(processor, image_settings=ImageSettings(rescale_factor=1 / 127.5))
    caches = [FeatureCache(tmp_path, model, each) for each in (processor, stretched, processor)]
    assert caches[0].folder == caches[2].folder != caches[1].folder


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    """The best is by validation loss, however old, and a resumed run still keeps it."""

    def loss(model, batch, max_targets):
        return jnp.sum(model["x"]), jnp.float32(1)

    def make_trainer():
        return Trainer({"x": jnp.zeros(1)}, TOY, 9, loss)

    folder, trainer = tmp_path / "run", make_trainer()
    checkpoints, state = Checkpoints(folder, keep=2), trainer.start()
    for step, validation_loss in enumerate([3.0, None, 1.0, None, 2.0], 1):
        state, _ = trainer.step(state, trainer.frozen, None, max_targets=0)
        checkpoints.save(step, state, {"validation_loss": validation_loss})
    checkpoints.finish()
    # The remains of a process that was killed while removing a checkpoint.
    shutil.copytree(folder / "checkpoints/5/default", folder / "checkpoints/2/default")
    checkpoints = Checkpoints(folder, keep=2)
    assert int(checkpoints.restore(make_trainer().start()).step) == 5
    assert checkpoints.best_step() == 3
    checkpoints.save(6, state, {"validation_loss": 4.0})
    checkpoints.finish()
    assert steps_of(folder) == [3, 5, 6]


def test_rows_may_come_from_a_list_or_from_grain(data, tmp_path):
    """The losses equal those from a file."""
    grain = pytest.importorskip("grain", reason="requires the extra test-core")
    config = small_config(data, tmp_path / "file", steps=3, learning_rate=1e-3)
    finetune(config)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [row | {"image": Image.open(data.parent / row["image"])} for row in rows]
    for name, source in (("list", rows), ("grain", grain.MapDataset.source(rows).map(dict))):
        finetune(replace(config, data="", output=str(tmp_path / name)), data=source)
        assert losses(tmp_path / name) == losses(tmp_path / "file")
    config = replace(config, output=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--features requires images that are files"):
        finetune(replace(config, features=str(tmp_path / "f"), train="decoder"), data=rows)
    without_suffix = {"image": rows[0]["image"], "prefix": "ocr"}
    too_long = rows[0] | {"prefix": "ocr " * 9000}
    for row, message in ((without_suffix, "suffix is missing"), (too_long, "the context is")):
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            finetune(config, data=[rows[0], row])


def test_logs(data, tmp_path):
    run = tmp_path / "run"
    config = small_config(data, run, steps=4, validate_every=2, samples=2, tensorboard=True)
    finetune(config, validation=read_examples(data)[:5])
    log = read_log(run)
    assert [line["step"] for line in log if "validation_loss" in line] == [2, 4]
    for line in log:
        assert 0 < line["mfu"] < 1.5 and line["memory_bytes"] > 1e8 and line["tokens_s"] > 0
    assert log[0]["learning_rate"] == pytest.approx(config.learning_rate)
    samples = read_log(run, "samples.jsonl")
    assert [line["step"] for line in samples] == [2, 2, 4, 4]
    assert {line["suffix"] for line in samples} == {"0", "1"}
    board = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert b"validation_loss" in board and b"learning_rate" in board


@pytest.mark.thorough
def test_without_a_terminal_progress_is_printed_as_lines(command, data, tmp_path, monkeypatch):
    seconds = itertools.count(step=4)  # a step takes 4 s, an interval 30 s
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(progress, "time", clock)
    options = ["--steps", 30, "--batch-size", 4, "--train", "projector", "--learning-rate", 1e-3]
    code, _, error = command("finetune", "--data", data, "--output", tmp_path / "run", *options)
    assert code == 0, error
    pattern = (
        r"finetune: (\d+)/120, step=(\d+)/30, loss=\d+\.\d{4}, learning_rate=\d\.\d\de-\d\d "
        r"\[\d\d:\d\d elapsed, \d\d:\d\d left, +\d+\.\d\drow/s\]"
    )
    lines = [match for line in error.splitlines() if (match := re.fullmatch(pattern, line))]
    steps = [int(line[2]) for line in lines]
    assert steps == [1, 9, 17, 25, 30]
    assert all(int(line[1]) == 4 * step for line, step in zip(lines, steps, strict=True))


def test_parts_of_a_batch_must_have_the_same_number_of_images(data, tmp_path):
    images = [str(data.parent / f"{i}.png") for i in range(3)]
    rows = [{"image": images[: 1 + i % 3], "prefix": "ocr", "suffix": "x"} for i in range(4)]
    config = small_config("", tmp_path / "run", steps=1)
    message = "--accumulate requires the same number in each of its 2 parts"
    with pytest.raises(ValueError, match=message):
        finetune(replace(config, accumulate=2), data=rows)
    finetune(config, data=rows)


def test_the_default_lora_target_is_that_of_add_lora():
    assert FinetuneConfig("", "").lora_target == lora.TARGET


TRAIN_CHOICES = "all, decoder, attention, projector, lora, prompt, prefix or a regular expression"


@pytest.mark.parametrize(
    "options,message",
    [
        (["--train", "("], f"--train must be {TRAIN_CHOICES}, got '('"),
        (["--train", "nothing"], "--train 'nothing' matches no parameter"),
        (
            ["--train", "decoder/layers/9/.*|projector/.*"],
            "every alternative of --train must match a parameter, got 'decoder/layers/9/.*'",
        ),
        (["--train", "decoder/layers/[12]/.*|decoder/norm/scale"], "add --layers list"),
        (
            ["--train", "lora", "--lora-target", "decoder/.*|vision/.*"],
            "every alternative of --lora-target must match a layer in a tower with a rank",
        ),
        (
            ["--train", "lora", "--modules-to-save", "projector|decoder/head"],
            "every alternative of --modules-to-save must match a module, got 'decoder/head'",
        ),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "3", "--accumulate", "2"], "must divide --batch-size 3, got 2"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive and finite, got inf"),
        (["--seed", str(2**40)], "--seed must be at least 0 and below 2**32, got"),
        (["--learning-rate", "1e400"], "--learning-rate must be positive and finite, got inf"),
        (["--learning-rate", "1e39"], "--learning-rate must be from 1.2e-38 to 3.4e38"),
        (["--learning-rate", "1e-60"], "--learning-rate must be from 1.2e-38 to 3.4e38"),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite, got nan"),
        (["--lora-alpha", "1e300"], "--lora-alpha must be from 1.2e-38 to 3.4e38"),
        (["--weight-decay", "inf"], "--weight-decay must be from 0 to 3.4e38"),
        (["--warmup", "inf"], "--warmup must be from 0 to 3.4e38"),
        (["--vision-rate", "nan"], "--vision-rate must be from 0 to 3.4e38"),
        (["--clip", "nan"], "--clip must be at least 0, got nan"),
        (["--beta2", "0.9999999999"], "--beta2 must be at most 0.99999994"),
        (["--epochs", "1e300"], "--epochs 1e+300 is more than 2**31 steps"),
        (["--steps", "1" + "0" * 4000], "--steps must be below 2**31, got about 10**4000"),
        (["--batch-size", "1000000000"], "--batch-size 1000000000: the images of a batch need"),
        (["--length", "1000000000"], "--length must be at most 8192, the context of the model"),
        (["--lora-rank", str(10**20)], "--lora-rank must be below 2**31"),
        (["--validate-every", "5"], "--validate-every 5 requires --validation"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, got 1.0"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--resume"], "no run to resume"),
        (["--length", "20"], "length is 20"),
    ],
)
def test_user_errors_are_one_line(command, data, tmp_path, options, message):
    options = options if "--data" in options else ["--data", data, *options]
    code, _, error = command("finetune", "--output", tmp_path / "run", *options)
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "value,message",
    [("3", "at least 1, got '3'"), (2.5, "an integer, got 2.5"), (True, "at least 1, got True")],
)
def test_config_values_of_the_wrong_type_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^--steps must be {message}$"):
        FinetuneConfig("", "", steps=value)
