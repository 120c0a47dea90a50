"""A run as a person makes it: the command, what it leaves behind, and what happens when it is stopped."""

from __future__ import annotations

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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.finetuning import losses, weights
from support.toys import TOY

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.data.rows import read_examples
from paligemma_jax.model.tree import parameters
from paligemma_jax.training import features, runs
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.prepare import load_trainable
from paligemma_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_the_command(command, data, tmp_path):
    run = tmp_path / "run"
    options = [
        "--steps",
        8,
        "--batch-size",
        4,
        "--accumulate",
        2,
        "--learning-rate",
        1e-3,
        "--save-every",
        3,
    ]
    options += ["--train", "decoder", "--export", "huggingface"]
    code, out, error = command(
        "finetune", "--data", data, "--validation", data, "--output", run, *options
    )
    assert code == 0, error
    assert out.strip() == str(run / "model")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert (
        [line["step"] for line in log] == list(range(1, 9))
        and log[-1]["loss"] < 0.5 * log[0]["loss"]
        and "validation_loss" in log[-1]
    )
    assert (run / "loss.png").stat().st_size > 1000 and json.loads(
        (run / "config.json").read_text()
    )["batch_size"] == 4
    assert len(list((run / "checkpoints").iterdir())) == 2
    before, after = weights(TINY), weights(run / "model")
    assert all(
        (before[path] == after[path]).all() != path.startswith("decoder/") for path in before
    )  # the frozen part to the bit
    assert isinstance(pg.load(run / "model").generate(data.parent / "3.png", "ocr"), list)


def test_a_stopped_run_continues_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    options = FinetuneConfig(
        str(data),
        str(tmp_path / "whole"),
        steps=7,
        batch_size=4,
        learning_rate=1e-3,
        save_every=2,
        optimizer="adamw",
        ema=0.9,
    )
    finetune(options)
    stopped, log = replace(options, output=str(tmp_path / "stopped")), runs.Run.log

    def stop(self, line):
        log(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "log", stop)
    assert finetune(stopped) == tmp_path / "stopped" and re.search(
        "stopped after step [3-6]; continue with --resume", capsys.readouterr().out
    )
    finetune(replace(stopped, resume=True))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, continued = (
        weights(tmp_path / "whole" / "model"),
        weights(tmp_path / "stopped" / "model"),
    )
    assert all((whole[path] == continued[path]).all() for path in whole)
    with pytest.raises(ValueError, match="other settings: batch_size 4, now 2"):
        finetune(replace(stopped, resume=True, batch_size=2))
    with pytest.raises(ValueError, match="is not empty"):
        finetune(stopped)


def test_a_run_that_cannot_start_leaves_nothing(data, tmp_path, monkeypatch):
    """So that the corrected command finds its folder free."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    kept = dict(train="vision/.*", features=str(tmp_path / "kept"))
    for wrong, told in (
        (dict(train="everything"), "everything"),
        (dict(tensorboard=True), "--tensorboard requires the train extra"),
        (kept, "frozen"),
    ):
        with pytest.raises(ValueError, match=told):
            finetune(
                FinetuneConfig(str(data), str(tmp_path / "run"), steps=1, batch_size=4, **wrong)
            )
        assert not (tmp_path / "run").exists() and not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_twenty_kills(data, tmp_path):
    """Killed at random moments, while it starts, learns or saves, and resumed each time: the weights of the run that was never killed."""
    begin = [
        sys.executable,
        "-m",
        "paligemma_jax",
        "finetune",
        "--data",
        str(data),
        "--steps",
        "300",
    ]
    begin += ["--batch-size", "4", "--learning-rate", "1e-4", "--save-every", "5", "--length", "96"]
    settings = dict(env=os.environ | {"PALIGEMMA_JAX_CACHE": str(tmp_path / "cache")})
    run, rng, killed_at = tmp_path / "run", random.Random(0), []
    resumed = lambda: [
        *begin,
        "--output",
        str(run),
        *(["--resume"] if (run / "config.json").exists() else []),
    ]
    logged = lambda: (
        (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0
    )
    for _ in range(20):
        process, steps, fewest = (
            subprocess.Popen(resumed(), **settings),
            rng.randrange(12),
            logged(),
        )
        while logged() < fewest + steps and process.poll() is None:
            fewest = min(fewest, logged())  # what was logged after the last checkpoint is dropped
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if steps else rng.uniform(0, 8))
        assert process.poll() is None, f"the run was over, or refused to go on, after {killed_at}"
        process.kill()
        process.wait()
        killed_at.append(logged())
    assert max(killed_at) > 40 and len(set(killed_at)) > 10
    assert subprocess.run(resumed(), check=False, **settings).returncode == 0
    assert (
        subprocess.run(
            [*begin, "--output", str(tmp_path / "whole")], check=False, **settings
        ).returncode
        == 0
    )
    assert sorted(int(folder.name) for folder in (run / "checkpoints").iterdir()) == [295, 300]
    whole, killed = weights(tmp_path / "whole" / "model"), weights(run / "model")
    assert all((whole[path] == killed[path]).all() for path in whole) and losses(run) == losses(
        tmp_path / "whole"
    )


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path):
    options = dict(
        steps=9,
        batch_size=4,
        learning_rate=1e30,
        warmup=0,
        clip=0,
        optimizer="sgd",
        train="decoder",
        features=str(tmp_path / "kept"),
    )
    with pytest.raises(
        ValueError,
        match=r"loss (nan|inf) and gradient norm .* at step \d must be finite; its batch is saved in .*bad_batch",
    ):
        finetune(FinetuneConfig(str(data), str(tmp_path / "run"), **options))
    (file,) = (tmp_path / "run").glob("bad_batch_*.npz")
    assert np.load(file)["tokens"].shape[0] == np.load(file)["features"].shape[0] == 4


def test_a_measurement_that_fails_loses_no_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma_jax.training.validation.Validation.loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(
            FinetuneConfig(
                str(data),
                str(tmp_path / "run"),
                validation=str(data),
                steps=3,
                batch_size=4,
                train="projector",
                validate_every=2,
            )
        )
    assert len(losses(tmp_path / "run")) == 2 and [
        folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()
    ] == ["2"]


@pytest.mark.parametrize(
    "rows,validation,expected",
    [
        ([], None, "data has no rows"),
        (iter([{}]), None, "data must be a list"),
        (range(2**40), None, "do not repeat the data set"),
        ([{"weight": 0}] * 2, None, "data has no row with a weight above 0"),
        ([{"image": "no.png"}], None, "^row 0: no image file at no.png"),
        ([{}], [{}, {"image": "no.png"}], "^validation: row 1: no image file at no.png"),
        ([{}], [], "--validate-every 1 requires --validation"),
    ],
)
def test_rows_that_no_run_can_have(tmp_path, rows, validation, expected):
    """Told before the folder is made."""
    whole = lambda rows: [
        {"image": np.zeros((8, 8, 3), np.uint8), "prefix": "ocr", "suffix": "1"} | row
        for row in rows
    ]
    rows, validation = (
        whole(given) if isinstance(given, list) else given for given in (rows, validation)
    )
    with pytest.raises(ValueError, match=expected):
        finetune(
            FinetuneConfig(
                "",
                str(tmp_path / "run"),
                steps=1,
                batch_size=2,
                validate_every=1 if validation == [] else 0,
            ),
            rows,
            validation,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("train", ["projector/.*", "vision/.*", "decoder/norm/.*"])
def test_beside_quantized_projections_the_rest_learns(train):
    load_trainable(FinetuneConfig("", "", train=train, quantize="nf4"), resolve("tiny"), None)


@pytest.mark.parametrize("asked,expected", [(None, "bfloat16"), ("float32", "float32")])
def test_on_accelerators_it_computes_in_bfloat16(tmp_path, monkeypatch, asked, expected):
    """By default also where the checkpoint is float32; what learns is float32."""
    save_model(tmp_path / "wide", load_model(TINY, "float32"), like="tiny")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load_model(tmp_path / "wide").config.dtype == "float32"
    model = load_trainable(
        FinetuneConfig("", "", train="projector", dtype=asked), resolve(tmp_path / "wide"), None
    )
    kinds = {
        path.startswith("projector/"): value.dtype.name for path, value in parameters(model).items()
    }
    assert model.config.dtype == expected and kinds == {True: "float32", False: expected}


def test_features_are_made_once_and_change_nothing(data, tmp_path, monkeypatch):
    """Training on what the frozen encoder said before equals training with the encoder; what one run kept the next one reads."""
    options = FinetuneConfig(
        str(data),
        str(tmp_path / "plain"),
        steps=4,
        batch_size=4,
        accumulate=2,
        learning_rate=1e-3,
        train="decoder",
    )
    finetune(options, validation=read_examples(data))
    kept = replace(options, output=str(tmp_path / "kept"), features=str(tmp_path / "features"))
    finetune(kept, validation=read_examples(data))
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "plain"), rtol=1e-5)
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 12
    monkeypatch.setattr(features, "pixel_values", None)  # needed no more
    finetune(replace(kept, output=str(tmp_path / "again")))


def test_the_last_checkpoints_stay_and_the_best(tmp_path):
    """The best on validation, however long ago; after a stop it is still known."""
    trainer = Trainer(
        {"x": jnp.zeros(1)},
        TOY,
        9,
        loss=lambda model, batch, max_targets: (jnp.sum(model["x"]), jnp.float32(1)),
    )
    run, losses = (
        runs.Run(FinetuneConfig("", str(tmp_path / "run"), keep=2)),
        [3.0, None, 1.0, None, 2.0],
    )
    state = trainer.start()
    for step, loss in enumerate(losses, 1):
        state, _ = trainer.step(state, trainer.frozen, None, max_targets=0)
        run.save(step, state, loss)
    run.finish()
    shutil.copytree(
        tmp_path / "run/checkpoints/5/default", tmp_path / "run/checkpoints/2/default"
    )  # as left by a kill while it was removed
    run = runs.Run(FinetuneConfig("", str(tmp_path / "run"), keep=2, resume=True))
    assert int(run.restore(trainer_again(trainer)).step) == 5
    run.save(6, state, 4.0)
    run.finish()
    assert sorted(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()) == [
        3,
        5,
        6,
    ]


def trainer_again(trainer):
    return Trainer({"x": jnp.zeros(1)}, trainer.config, 9, loss=trainer.loss).start()


def test_rows_of_any_source(data, tmp_path):
    """Of grain's, and of a plain list, the same run as of the file."""
    grain = pytest.importorskip(
        "grain", reason="the source is grain's: install the extra test-core"
    )
    options = FinetuneConfig(
        str(data), str(tmp_path / "file"), steps=3, batch_size=4, learning_rate=1e-3
    )
    finetune(options)
    rows = [
        {**json.loads(line), "image": Image.open(data.parent / json.loads(line)["image"])}
        for line in data.read_text().splitlines()
    ]
    for name, source in (("list", rows), ("grain", grain.MapDataset.source(rows).map(dict))):
        finetune(replace(options, data="", output=str(tmp_path / name)), data=source)
        assert losses(tmp_path / name) == losses(tmp_path / "file")
    with pytest.raises(ValueError, match="--features requires images that are files"):
        finetune(
            replace(
                options, output=str(tmp_path / "x"), features=str(tmp_path / "f"), train="decoder"
            ),
            data=rows,
        )
    for row, message in (
        ({"image": rows[0]["image"], "prefix": "ocr"}, "suffix is missing"),
        (rows[0] | {"prefix": "ocr " * 9000}, "the context is"),
    ):
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            finetune(replace(options, output=str(tmp_path / message[:3])), data=[rows[0], row])


def test_what_is_logged(data, tmp_path):
    options = FinetuneConfig(
        str(data),
        str(tmp_path / "run"),
        steps=4,
        batch_size=4,
        validate_every=2,
        samples=2,
        tensorboard=True,
    )
    finetune(options, validation=read_examples(data)[:5])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "validation_loss" in line] == [2, 4]
    assert all(
        0 < line["mfu"] < 1.5 and line["memory_bytes"] > 1e8 and line["tokens_s"] > 0
        for line in log
    )
    samples = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in samples] == [2, 2, 4, 4] and {
        line["suffix"] for line in samples
    } == {"0", "1"}
    assert b"validation_loss" in b"".join(
        file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir()
    )


def test_parts_must_have_as_many_images_each(data, tmp_path):
    images = [str(data.parent / f"{i}.png") for i in range(3)]
    rows = [{"image": images[: 1 + i % 3], "prefix": "ocr", "suffix": "x"} for i in range(4)]
    with pytest.raises(
        ValueError, match=r"--accumulate requires the same number in each of its 2 parts"
    ):
        finetune(
            FinetuneConfig("", str(tmp_path / "run"), steps=1, batch_size=4, accumulate=2),
            data=rows,
        )
    finetune(FinetuneConfig("", str(tmp_path / "whole"), steps=1, batch_size=4), data=rows)


@pytest.mark.parametrize(
    "options,expected",
    [
        (
            ["--train", "("],
            "--train must be all, decoder, attention, projector, lora or a regular expression, got '('",
        ),
        (["--train", "nothing"], "matches no parameter"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["--batch-size", "3", "--accumulate", "2"],
            "--accumulate must divide --batch-size 3, got 2",
        ),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive and finite, got inf"),
        (["--seed", str(2**40)], "--seed must be at least 0 and below 2**32, got"),
        (["--validate-every", "5"], "--validate-every 5 requires --validation"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, got 1.0"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--resume"], "no run to resume"),
        (["--length", "20"], "length is 20"),
    ],
)
def test_mistakes_are_told_in_one_line(command, data, tmp_path, options, expected):
    given = [] if "--data" in options else ["--data", data]
    code, _, error = command("finetune", *given, "--output", tmp_path / "run", *options)
    assert code == 2 and expected in error and error.count("\n") == 1
