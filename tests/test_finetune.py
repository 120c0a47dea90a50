"""A run as a person makes it: the command, what it leaves behind, and what happens when it is stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.checkpoint import TINY, load_model
from paligemma_jax.model.layers import parameters
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.synthetic import stacked
from paligemma_jax.training import features, runs
from paligemma_jax.training.config import Finetune
from paligemma_jax.training.data import Batch, order, read
from paligemma_jax.training.finetune import finetune, prepared
from paligemma_jax.training.losses import answer_loss, token_loss
from paligemma_jax.training.trainer import Trainer

from PIL import Image  # isort: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 images of noise, each with its number to say, as JSONL."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = [{"image": f"{i}.png", "prefix": "ocr", "suffix": str(i)} for i in range(12)]
    for row in rows:
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)).save(folder / row["image"])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def weights(folder):
    return {path: np.asarray(value) for path, value in parameters(load_model(folder)).items()}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_command(command, data, tmp_path):
    run = tmp_path / "run"
    options = ["--steps", 8, "--batch-size", 4, "--accumulate", 2, "--learning-rate", 1e-3, "--save-every", 3]
    options += ["--train", "decoder", "--export", "huggingface"]
    code, out, error = command("finetune", "--data", data, "--validation", data, "--output", run, *options)
    assert code == 0, error
    assert out.strip() == str(run / "model")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 9)) and log[-1]["loss"] < 0.5 * log[0]["loss"] and "validation_loss" in log[-1]
    assert (run / "loss.png").stat().st_size > 1000 and json.loads((run / "config.json").read_text())["batch_size"] == 4
    assert len(list((run / "checkpoints").iterdir())) == 2
    before, after = weights(TINY), weights(run / "model")
    assert all((before[path] == after[path]).all() != path.startswith("decoder/") for path in before)  # the frozen part to the bit
    assert isinstance(pg.load(run / "model").generate(data.parent / "3.png", "ocr"), list)


def test_a_stopped_run_continues_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    options = Finetune(str(data), str(tmp_path / "whole"), steps=7, batch_size=4, learning_rate=1e-3, save_every=2, optimizer="adamw", ema=0.9)
    finetune(options)
    stopped, log = replace(options, output=str(tmp_path / "stopped")), runs.Run.log

    def stop(self, line):
        log(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "log", stop)
    assert finetune(stopped) == tmp_path / "stopped" and "stopped after step 3" in capsys.readouterr().out
    finetune(replace(stopped, resume=True))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, continued = weights(tmp_path / "whole" / "model"), weights(tmp_path / "stopped" / "model")
    assert all((whole[path] == continued[path]).all() for path in whole)
    with pytest.raises(ValueError, match="other settings: batch_size 4, now 2"):
        finetune(replace(stopped, resume=True, batch_size=2))
    with pytest.raises(ValueError, match="is not empty"):
        finetune(stopped)


@pytest.mark.slow
def test_twenty_kills(data, tmp_path):
    """Killed at random moments and resumed each time: the weights of the run that was never killed."""
    begin = [sys.executable, "-m", "paligemma_jax", "finetune", "--data", str(data), "--steps", "1500"]
    begin += ["--batch-size", "4", "--learning-rate", "1e-4", "--save-every", "10"]
    assert subprocess.run([*begin, "--output", str(tmp_path / "whole")], check=False).returncode == 0
    run, rng = tmp_path / "run", random.Random(0)
    resumed = lambda: [*begin, "--output", str(run), *(["--resume"] if (run / "config.json").exists() else [])]
    for kills in range(20):
        process = subprocess.Popen(resumed())
        time.sleep(rng.uniform(1, 7))
        assert process.poll() is None, f"the run was over, or refused to go on, after {kills} kills"
        process.kill()
        process.wait()
    assert subprocess.run(resumed(), check=False).returncode == 0
    whole, killed = weights(tmp_path / "whole" / "model"), weights(run / "model")
    assert all((whole[path] == killed[path]).all() for path in whole) and losses(run) == losses(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path):
    with pytest.raises(ValueError, match=r"the loss of step \d is (nan|inf); its batch is in .*bad_batch"):
        finetune(Finetune(str(data), str(tmp_path / "run"), steps=9, batch_size=4, learning_rate=1e30, warmup=0, clip=0, optimizer="sgd"))
    (file,) = (tmp_path / "run").glob("bad_batch_*.npz")
    assert np.load(file)["tokens"].shape[0] == 4


def batch(model, extra=0, side="right"):
    """Two rows of tiny, with `extra` columns of padding."""
    rng, P = np.random.default_rng(0), model.config.vision.num_patches
    tokens = np.concatenate([np.full((2, P), model.config.image_token_id), rng.integers(5, 400, (2, 9))], 1).astype(np.int32)
    images = rng.uniform(-1, 1, (2, model.config.vision.image_size, model.config.vision.image_size, 3)).astype(np.float32)
    valid = np.arange(P + 9) < np.array([[P + 9], [P + 7]])
    targets = valid & (np.arange(P + 9) >= P + 4)
    pad = [(0, 0), (extra, 0) if side == "left" else (0, extra)]
    tokens, valid, targets = (np.pad(a, pad) for a in (tokens, valid, targets))
    return Inputs(tokens, images, valid, valid & ~targets, targets)


def loss_of(model, inputs):
    total, count = answer_loss(model, jax.tree.map(jnp.asarray, inputs), jnp.ones(2), 8)
    return total / count


def test_padding_moves_neither_loss_nor_gradient():
    model = load_model(TINY)
    loss, gradient = jax.value_and_grad(loss_of)(model, batch(model))
    assert float(loss) == pytest.approx(float(token_loss(model(*_called(batch(model))), batch(model).tokens, batch(model).targets)), rel=1e-5)
    for extra, side in ((5, "right"), (5, "left")):
        other, moved = jax.value_and_grad(loss_of)(model, batch(model, extra, side))
        assert float(other) == pytest.approx(float(loss), rel=1e-5)
        for path, value in parameters(moved).items():
            wanted = parameters(gradient)[path]
            assert jnp.linalg.norm(value - wanted) <= 1e-4 * jnp.linalg.norm(wanted) + 1e-6, path


def _called(inputs):
    return inputs.tokens, inputs.images, inputs.valid, inputs.prefix


def test_layers_and_remat_change_nothing():
    """One step with stacked layers and with either remat equals the plain one."""
    found = {}
    for form, remat in (("list", "none"), ("stack", "none"), ("stack", "full"), ("list", "dots")):
        model = load_model(TINY)
        config = Finetune("", "", batch_size=2, warmup=0, learning_rate=1.0, optimizer="sgd", clip=0, beta1=0, remat=remat)
        trainer = Trainer(stacked(model) if form == "stack" else model, config, 1)
        data = Batch(batch(model), np.ones(2, np.float32))
        state, _ = trainer.step(trainer.start(), trainer.frozen, data, longest=8)
        found[form, remat] = state.learns["decoder/embedder/table"]
    for value in found.values():
        np.testing.assert_allclose(value, found["list", "none"], atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
@pytest.mark.parametrize("form", ["list", "stack"])
def test_every_optimizer_learns(optimizer, form):
    model = load_model(TINY)
    rate = {"sgd": 1e-1, "muon": 1e-2}.get(optimizer, 1e-3)
    config = Finetune("", "", batch_size=2, optimizer=optimizer, learning_rate=rate, weight_decay=0.01, train="decoder")
    trainer = Trainer(stacked(model) if form == "stack" else model, config, 12)
    state, data, seen = trainer.start(), Batch(batch(model), np.ones(2, np.float32)), []
    for _ in range(12):
        state, report = trainer.step(state, trainer.frozen, data, longest=8)
        seen.append(float(report["loss"]))
    assert seen[-1] < 0.8 * seen[0]


def test_features_are_made_once_and_change_nothing(data, tmp_path, monkeypatch):
    """Training on what the frozen encoder said before equals training with the encoder; what one run kept the next one reads."""
    options = Finetune(str(data), str(tmp_path / "plain"), steps=4, batch_size=4, accumulate=2, learning_rate=1e-3, train="decoder")
    finetune(options, validation=read(data))
    kept = replace(options, output=str(tmp_path / "kept"), features=str(tmp_path / "features"))
    finetune(kept, validation=read(data))
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "plain"), rtol=1e-5)
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 12
    monkeypatch.setattr(features, "pixels", None)  # needed no more
    finetune(replace(kept, output=str(tmp_path / "again")))


def test_rows_of_any_source(data, tmp_path):
    """Of grain's, and of a plain list, the same run as of the file."""
    grain = pytest.importorskip("grain", reason="the source is grain's: install the extra test-core")
    options = Finetune(str(data), str(tmp_path / "file"), steps=3, batch_size=4, learning_rate=1e-3)
    finetune(options)
    rows = [{**json.loads(line), "image": Image.open(data.parent / json.loads(line)["image"])} for line in data.read_text().splitlines()]
    for name, source in (("list", rows), ("grain", grain.MapDataset.source(rows).map(dict))):
        finetune(replace(options, data="", output=str(tmp_path / name)), data=source)
        assert losses(tmp_path / name) == losses(tmp_path / "file")
    with pytest.raises(ValueError, match="--features keeps what is made of image files"):
        finetune(replace(options, output=str(tmp_path / "x"), features=str(tmp_path / "f"), train="decoder"), data=rows)


def test_what_is_logged(data, tmp_path):
    options = Finetune(str(data), str(tmp_path / "run"), steps=4, batch_size=4, validate_every=2, samples=2, tensorboard=True)
    finetune(options, validation=read(data)[:5])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "validation_loss" in line] == [2, 4]
    assert all(0 < line["mfu"] < 1.5 and line["memory_bytes"] > 1e8 and line["tokens_s"] > 0 for line in log)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [2, 2, 4, 4] and {line["suffix"] for line in samples} == {"0", "1"}
    assert b"validation_loss" in b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())


def test_parts_must_have_as_many_images_each(data, tmp_path):
    images = [str(data.parent / f"{i}.png") for i in range(3)]
    rows = [{"image": images[: 1 + i % 3], "prefix": "ocr", "suffix": "x"} for i in range(4)]
    with pytest.raises(ValueError, match=r"--accumulate asks for as many in each of its 2 parts"):
        finetune(Finetune("", str(tmp_path / "run"), steps=1, batch_size=4, accumulate=2), data=rows)
    finetune(Finetune("", str(tmp_path / "whole"), steps=1, batch_size=4), data=rows)


def test_the_encoder_learns_at_its_own_rate():
    model = load_model(TINY)
    config = Finetune("", "", batch_size=2, warmup=0, learning_rate=1e-3, vision_rate=0.1, clip=0)
    trainer = Trainer(model, config, 10)
    state, _ = trainer.step(trainer.start(), trainer.frozen, Batch(batch(model), np.ones(2, np.float32)), longest=8)
    moved = {path: float(jnp.abs(value - parameters(model)[path]).max()) for path, value in state.learns.items()}
    assert moved["decoder/layers/0/mlp/up/kernel"] == pytest.approx(1e-3, rel=0.01)
    assert moved["vision/layers/0/mlp/up/kernel"] == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("train,quantized", [("all", None), ("decoder", None), ("lora", None), ("lora", "nf4")])
def test_in_bfloat16_what_is_frozen_stays_so_and_what_learns_is_float32(data, tmp_path, train, quantized):
    config = Finetune(str(data), "", train=train, quantize=quantized, dtype="bfloat16", lora_rank=2, batch_size=2, learning_rate=1e-3)
    wide = lambda path: bool(re.fullmatch(config.pattern, path))
    trainer = Trainer(prepared(load_model(TINY, "bfloat16", wide=wide, quantize=quantized), config), config, 4)
    state, found = trainer.start(), []
    for _ in range(4):
        state, report = trainer.step(state, trainer.frozen, Batch(batch(load_model(TINY)), np.ones(2, np.float32)), longest=8)
        found.append(float(report["loss"]))
    assert found[-1] < found[0]
    assert {value.dtype.name for value in state.learns.values()} == {"float32"}
    kept = {value.dtype.name for path, value in trainer.frozen.items() if not path.endswith(("codes", "/scale"))}
    assert kept == (set() if train == "all" else {"bfloat16"})
    assert {value.dtype.name for path, value in trainer.frozen.items() if path.endswith("codes")} == ({"uint8"} if quantized else set())


def test_order():
    first = order(10, 0, 0, 30)
    assert all(sorted(first[i : i + 10]) == list(range(10)) for i in (0, 10, 20)) and list(first[:10]) != list(first[10:20])
    np.testing.assert_array_equal(order(10, 0, 7, 9), first[7:16])
    assert list(order(10, 1, 0, 10)) != list(first[:10])


def test_wrong_rows_are_counted_and_named(data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = ["{", '{"image": "a.png", "prefix": "x", "suffix": "y"}', '{"prefix": "x", "suffix": "y"}', '{"image": "b", "prefix": "x", "suffix": ""}']
    rows += ['{"image": "broken.png", "prefix": "x", "suffix": "y"}', '{"image": "b", "prefix": "x", "suffix": 3}', "[]", ""]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as told:
        read(tmp_path / "rows.jsonl")
    message = str(told.value)
    for part in ("7 rows cannot be used", "line 1: not JSON", "line 3: image is missing", "line 4: suffix is empty", "and 2 more"):
        assert part in message
    for text, expected in (("", "has no rows"), ("\n", "has no rows")):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(ValueError, match=expected):
            read(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "options,expected",
    [
        (["--train", "("], "or a regular expression"),
        (["--train", "nothing"], "matches no parameter"),
        (["--batch-size", "0"], "is at least 1"),
        (["--batch-size", "3", "--accumulate", "2"], "does not divide"),
        (["--steps", "0"], "nothing to do"),
        (["--label-smoothing", "1"], "lies in"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--resume"], "no run to resume"),
        (["--length", "20"], "length is 20"),
    ],
)
def test_mistakes_are_told_in_one_line(command, data, tmp_path, options, expected):
    given = [] if "--data" in options else ["--data", data]
    code, _, error = command("finetune", *given, "--output", tmp_path / "run", *options)
    assert code == 2 and expected in error and error.count("\n") == 1
