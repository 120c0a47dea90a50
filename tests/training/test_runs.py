"""The directory of a run: what `--model RUN` loads, and what a run that resumes may change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from support import on_devices
from support.finetuning import assert_equal, losses, small_config, weights

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.training.digest import rows_digest
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.runs import Run, RunContent, check_run_folder
from paligemma_jax.training.validation import Validation


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of 4 steps of a stack of norms and the projector, best on validation at step 2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "loss", lambda self, state: float(state.step))
        finetune(config_of(data, folder))
    return folder


def config_of(data, folder, **options):
    options = (
        dict(
            steps=4,
            learning_rate=1e-2,
            validate_every=2,
            samples=0,
            keep=1,
            ema=0.5,
            train="projector/.*|decoder/layers/.*norm/.*",
        )
        | options
    )
    return small_config(data, folder, validation=str(data), **options)


@pytest.mark.thorough
def test_the_best_on_validation_is_exported_beside_the_last(run):
    best, last = weights(run / "best/model"), weights(run / "model")
    assert (best["projector/bias"] != last["projector/bias"]).any()
    assert_equal(weights(run / "checkpoints/2"), best)
    assert_equal(weights(run / "checkpoints/4"), last)


def test_a_run_stands_for_its_best_model(run, tmp_path):
    source = resolve(run)
    assert source.weights == run / "best/model"
    assert source.note == f"{run} is a run: loading {run}/best/model, the best on validation"
    shutil.copytree(run, tmp_path / "run")
    for removed, found, name in (
        ("best", "model", "the result of the run"),
        ("model", "checkpoints/4", "the newest checkpoint"),
    ):
        shutil.rmtree(tmp_path / "run" / removed)
        note = resolve(tmp_path / "run").note
        assert note.endswith(f"loading {tmp_path}/run/{found}, {name}")
    assert_equal(weights(tmp_path / "run"), weights(run / "model"))
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    with pytest.raises(ValueError, match="is a run without a checkpoint yet"):
        resolve(tmp_path / "run")


def test_generate_takes_a_run_and_its_checkpoints(run, data, command):
    image, state = data.parent / "3.png", run / "checkpoints/2"
    expected = pg.load(state).generate(image, "ocr", 2)
    code, out, err = command(
        "generate", "--model", run, "--image", image, "--prompt", "ocr", "--max-new-tokens", 2
    )
    assert (code, out.splitlines()) == (0, expected)
    assert f"paligemma-jax: {run} is a run: loading" in err


def test_convert_takes_a_run_and_its_checkpoints(run, command, tmp_path):
    state = run / "checkpoints/2"
    code, _, err = command("convert", state, tmp_path / "hf", "--to", "huggingface", "--verify")
    assert code == 0, err
    assert_equal(weights(tmp_path / "hf"), weights(state))
    code, _, err = command("convert", run, tmp_path / "jax", "--to", "jax")
    assert code == 0, err
    assert_equal(weights(tmp_path / "jax"), weights(run / "best/model"))
    code, out, err = command("convert", "inspect", state)
    assert code == 0 and "resolution" in out, err


@pytest.mark.thorough
def test_a_state_of_lora_equals_the_adapter(data, tmp_path):
    """Scale and factors are those of the exported adapter, whose numbers peft reproduces."""
    run = tmp_path / "run"
    options = dict(train="lora", lora_rank=2, lora_alpha=6.0, rslora=True, validate_every=0)
    finetune(config_of(data, run, **options, steps=2))
    assert resolve(run).adapter == run / "adapter"
    assert_equal(weights(run / "checkpoints/2"), weights(run / "adapter"))
    assert resolve(run / "checkpoints/2").has_adapter


@pytest.mark.thorough
def test_a_run_resumes_for_more_steps(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = config_of(data, tmp_path / "run", resume=True)
    message = (
        "the run goes on to step 6 instead of 4, and so does its cosine schedule: the learning "
        "rate of step 5 is 0.0025 instead of 0$"
    )
    with pytest.warns(UserWarning, match=message):
        finetune(replace(config, steps=6))
    assert len(losses(tmp_path / "run")) == 6
    assert json.loads((tmp_path / "run/config.json").read_text())["total_steps"] == 6
    with pytest.raises(ValueError, match="was started for 6 steps, and --steps can only grow, got"):
        finetune(config)


def content_of(rows, steps=4):
    return RunContent("plain", steps, rows_digest(rows), rows_digest([]))


ROWS = [{"image": "a.png", "prefix": "ocr", "suffix": str(i)} for i in range(3)]


@pytest.fixture
def recorded(tmp_path):
    """The config of a run that consists of its config.json only."""
    config = small_config("old/rows.jsonl", tmp_path / "run", steps=4)
    Run(config, content_of(ROWS))
    return replace(config, resume=True)


def test_rows_are_compared_by_content(recorded):
    moved = [row | {"image": f"elsewhere/{row['image']}"} for row in ROWS]
    assert check_run_folder(replace(recorded, data="new.jsonl"), content_of(moved)) == 4
    for other in (
        ROWS[:2],
        ROWS[::-1],
        [ROWS[0] | {"weight": 2.0}, *ROWS[1:]],
        [ROWS[0] | {"image": "b.png"}, *ROWS[1:]],
    ):
        with pytest.raises(ValueError, match="was started with other rows as data"):
            check_run_folder(recorded, content_of(other))


def edit(config, **changes):
    file = Path(config.output) / "config.json"
    content = json.loads(file.read_text()) | changes
    kept = {name: value for name, value in content.items() if value != "removed"}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"steps": "many"}, "config.json: steps must be an integer or null, got 'many'"),
        ({"lora_alpha": []}, "config.json: lora_alpha must be a number"),
        ({"data": None}, "config.json: data must be a string, got null"),
        ({"schedule": "wild"}, "config.json: schedule: invalid enum value 'wild'"),
        ({"batch_size": 0}, "config.json: .*--batch-size must be at least 1, got 0"),
        ({"total_steps": -1}, "config.json: total_steps must be an integer of at least 1"),
        ({"future": 1, "other": 2}, "another version: it has the unknown settings future, other"),
        ({"model": "other"}, "was started with other settings: model was 'other', now 'tiny'"),
    ],
)
def test_a_damaged_config_is_one_line(recorded, changes, message):
    edit(recorded, **changes)
    with pytest.raises(ValueError, match=message) as error:
        check_run_folder(recorded, content_of(ROWS))
    assert "\n" not in str(error.value)


def test_a_config_of_an_older_version_is_named(recorded):
    edit(recorded, ema="removed", data_digest="removed", total_steps="removed")
    message = "config.json is of an older version without ema: their defaults are assumed"
    with pytest.warns(UserWarning, match=message):
        assert check_run_folder(recorded, content_of(ROWS)) == 4
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"data was 'old/rows\.jsonl'"):
        check_run_folder(replace(recorded, data="new.jsonl"), content_of(ROWS))


@pytest.mark.thorough
def test_a_run_on_a_mesh_of_ones_own_resumes_on_any(data, tmp_path):
    """The mesh is a `jax.sharding.Mesh` of eight devices, then of one, as an uninterrupted run."""
    folder = tmp_path / "run"
    error = on_devices.call(8, "support.own_meshes.interrupted_run", str(data), str(folder))
    assert error == "interrupted"
    assert json.loads((folder / "config.json").read_text())["mesh"] is None
    one = jax.make_mesh((1,), ("data",))
    options = dict(train="projector", steps=2, learning_rate=1e-3)
    finetune(small_config(data, folder, mesh=one, resume=True, **options))
    finetune(small_config(data, tmp_path / "full", **options))
    for resumed, full in zip(losses(folder), losses(tmp_path / "full"), strict=True):
        assert resumed == pytest.approx(full, rel=2e-5)
