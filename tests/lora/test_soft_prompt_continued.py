"""Soft prompts that are trained further, alone and beside LoRA, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from support.finetuning import losses

import paligemma_jax as pg
from convert import peft
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.training.config import FinetuneConfig

PHOTO = TINY.parent / "digits.jpg"
ROWS = [{"image": str(PHOTO), "prefix": "ocr", "suffix": "3 2 3 4"}] * 2
NOTHING = 1e-30  # a learning rate that changes no float32


def run(output, **options):
    defaults = dict(data="", train="prompt", steps=2, batch_size=2, samples=0, learning_rate=0.1)
    pg.finetune(FinetuneConfig(output=str(output), **defaults | options), data=ROWS)
    return output


def score(source, **options) -> float:
    return float(pg.load(source, **options).score([PHOTO], ["ocr"], ["3 2 3 4"])[0])


def base_of(adapter) -> str:
    return json.loads((adapter / peft.CONFIG).read_text())["base_model_name_or_path"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone") / "run", soft_prompt=4)


@pytest.fixture(scope="module")
def beside_lora(tmp_path_factory):
    options = dict(train="lora", lora_rank=2, soft_prompt=4, modules_to_save="projector")
    return run(tmp_path_factory.mktemp("beside") / "run", learning_rate=0.01, **options)


@pytest.mark.thorough
def test_it_starts_from_the_vectors_of_the_adapter(alone, tmp_path):
    """Given as an adapter or as its run, with the number of its vectors or without."""
    targets = pg.load(alone).processor(PHOTO, "ocr", "3 2 3 4").targets.sum()
    for i, options in enumerate([dict(model=str(alone)), dict(soft_prompt=4)]):
        further = run(tmp_path / str(i), **dict(model=str(alone / "adapter")) | options)
        assert losses(further)[0] == pytest.approx(-score(alone) / targets, rel=1e-5)
        assert losses(further)[-1] < losses(further)[0]
        assert pg.load(further).model.soft_prompt.shape == (4, 160)
        assert base_of(further / "adapter") == "tiny"
        assert score(further) == score(further / "checkpoints/2") > score(alone)


def test_bfloat16_does_not_round_the_vectors(alone, tmp_path):
    further = run(tmp_path / "run", model=str(alone), learning_rate=NOTHING, dtype="bfloat16")
    files = [folder / "adapter" / peft.WEIGHTS for folder in (alone, further)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("options", [{}, dict(quantize="int8", layers="list")])
@pytest.mark.thorough
def test_lora_beside_it_is_kept(beside_lora, tmp_path, options):
    further = run(tmp_path / "run", model=str(beside_lora), **options)
    config = load_model("tiny").config
    before, after = (peft.read(folder / "adapter", config) for folder in (beside_lora, further))
    assert base_of(further / "adapter") == "tiny" and before.factors.keys() == after.factors.keys()
    for path, factors in before.factors.items():
        np.testing.assert_array_equal(factors.a, after.factors[path].a)
        np.testing.assert_array_equal(factors.b, after.factors[path].b)
        assert factors.scale == after.factors[path].scale
    np.testing.assert_array_equal(
        *(x.parameters["projector/kernel"].numpy() for x in (before, after))
    )
    assert (before.soft_prompt != after.soft_prompt).all()
    # LoRA is merged in another order: logits of up to 26 differ by 1.2e-5, and so do scores.
    assert score(further) == pytest.approx(score(further / "checkpoints/2"), abs=2.6e-5)
    assert score(further) > score(beside_lora)


def test_a_first_prompt_on_lora_keeps_it(beside_lora, tmp_path):
    lora = tmp_path / "lora"
    config, base = load_model("tiny").config, tmp_path / "base"
    before = peft.read(beside_lora / "adapter", config)
    shutil.copytree(TINY, base)
    peft.save_adapter(lora, before.factors, config, str(tmp_path / "moved"))
    options = dict(soft_prompt=3, learning_rate=NOTHING, model=str(lora), base=str(base))
    further = run(tmp_path / "run", **options)
    adapter = peft.read(further / "adapter", config)
    assert adapter.soft_tokens == 3 and adapter.factors.keys() == before.factors.keys()
    assert base_of(further / "adapter") == str(base)
    targets = pg.load(further).processor(PHOTO, "ocr", "3 2 3 4").targets.sum()
    assert losses(further)[0] == pytest.approx(-score(further) / targets, rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(soft_prompt=8), "--soft-prompt must be 4, as --model .*adapter has it, or be left"),
        (dict(train="all"), "with --train prompt only, got --train all; or give its base, "),
        (dict(train="lora"), "has a soft prompt, .* with --train prompt only, got --train lora"),
        (dict(model="tiny"), "--train prompt requires --soft-prompt, the number of its vectors"),
    ],
)
def test_what_does_not_fit(alone, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **dict(model=str(alone / "adapter")) | options)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_training_state_cannot_be_the_base_of_an_adapter(alone, tmp_path):
    state = str(alone / "checkpoints/2")
    with pytest.raises(ValueError, match=r"is a training state, .*: give the adapter of its run"):
        run(tmp_path / "run", model=state)
    full = run(tmp_path / "full", train="projector", learning_rate=1e-3)
    for options in (dict(train="lora"), dict(soft_prompt=4)):
        with pytest.raises(ValueError, match=r"is a training state, .*: convert it first"):
            run(tmp_path / "run", model=str(full / "checkpoints/2"), **options)
    options = dict(train="lora", learning_rate=NOTHING, export="jax")
    assert score(run(tmp_path / "merged", model=str(full / "checkpoints/2"), **options)) == (
        pytest.approx(score(full), rel=1e-5)
    )
