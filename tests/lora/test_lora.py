"""LoRA and QLoRA without torch: what wrapping changes and what it does not, and a run of the command from data to answers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.finetuning import losses, weights
from support.logits import logits
from support.toys import batch

import paligemma_jax as pg
from convert import peft
from convert.peft import Factors
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name
from paligemma_jax.model.stack import stack_model, unstack_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.quantization.quantize import quantize_model
from paligemma_jax.tiny import sums
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.finetune import finetune
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_to_compile")

RANKS = {"decoder": 2, "vision": 3}




def learned(model, seed=0):
    """The model with B no longer 0."""
    rng = np.random.default_rng(seed)
    noise = lambda path, value: jnp.asarray(rng.normal(0, 0.1, value.shape), jnp.float32) if path.endswith("lora_b") else value
    return with_parameters(model, {path: noise(path, value) for path, value in parameters(model).items()}.__getitem__)


def test_it_begins_as_nothing_and_merges_into_the_same():
    plain = load_model(TINY)
    model = lora.add_lora(plain, RANKS, 4.0)
    np.testing.assert_array_equal(logits(model), logits(plain))
    model = learned(model)
    assert np.abs(logits(model) - logits(plain)).max() > 0.1
    merged = lora.merge_lora(model)
    assert parameters(merged).keys() == parameters(plain).keys()
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-4)
    np.testing.assert_allclose(logits(lora.unmerge_lora(merged, lora.lora_factors(model))), logits(plain), atol=2e-4)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_list_and_stack_are_the_same(kind):
    model = load_model(TINY) if kind is None else quantize_model(load_model(TINY), kind)
    listed = learned(lora.add_lora(model, RANKS, 4.0))
    stack = stack_model(listed, delete=False)
    np.testing.assert_allclose(logits(stack), logits(listed), atol=1e-4)
    found, expected = lora.lora_factors(stack), lora.lora_factors(listed)
    assert found.keys() == expected.keys() and len(found) == 4 * 7 + 4 * 6
    assert all((found[path].a == expected[path].a).all() and (found[path].b == expected[path].b).all() for path in found)
    assert parameters(unstack_model(stack)).keys() == parameters(listed).keys()


def test_ranks_scales_and_targets():
    model = load_model(TINY)
    only = lora.lora_factors(lora.add_lora(model, RANKS, 8.0, rslora=True, target=r".*attention/[qv]"))
    assert len(only) == 16 and {len(f.a) for path, f in only.items() if path.startswith("vision")} == {3}
    assert {f.scale for path, f in only.items() if path.startswith("decoder")} == {8 / math.sqrt(2)}
    assert not any(path.startswith("vision") for path in lora.lora_factors(lora.add_lora(model, {"decoder": 2}, 8.0)))
    assert "projector" in lora.lora_factors(lora.add_lora(model, RANKS, 8.0, target=r"projector|.*attention/q"))
    a = only["decoder/layers/0/attention/q"].a
    assert np.abs(a).max() <= 160**-0.5 and np.abs(a).std() == pytest.approx(160**-0.5 / 12**0.5, rel=0.1)
    with pytest.raises(ValueError, match="nothing to adapt"):
        lora.add_lora(model, RANKS, 8.0, target="nothing")


@pytest.mark.parametrize("preset", ["3b-224", "28b-896"])
def test_an_adapter_is_a_small_part_of_the_model(preset):
    """At the default rank under 2 % of the model's bytes, though it is held in float32 and the model in bfloat16; with rank 8 in the encoder too."""
    config = FinetuneConfig("", "", train="lora", lora_vision_rank=8)
    model = abstract_model_by_name(preset, "bfloat16")
    held = lambda model, lora: sum(math.prod(v.shape) * v.dtype.itemsize for p, v in parameters(model).items() if ("/lora_" in p) == lora)
    assert held(jax.eval_shape(lambda model: prepare_model(model, config), model), True) < 0.02 * held(model, False)


def test_dropout_is_of_training_alone_and_other_in_every_layer():
    model = learned(lora.add_lora(stack_model(load_model(TINY)), {"decoder": 2}, 4.0, dropout=0.5))
    plain = logits(model)
    np.testing.assert_array_equal(logits(model), plain)

    @jax.jit
    def dropped(key):
        with lora.lora_dropout(key):
            inputs = batch(model)
            return model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)

    one, two = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    assert np.abs(one - plain).max() > 1e-3 and np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(dropped(jax.random.key(0)), one)
    seeds = [np.asarray(value) for path, value in parameters(model).items() if path.endswith("/seed")]
    assert len(set(np.concatenate(seeds))) == 7 * 4


@pytest.mark.parametrize("quantized", [None, "nf4", "int8"])
def test_only_the_factors_learn(quantized):
    config = FinetuneConfig("", "", batch_size=2, train="lora", quantize=quantized, lora_rank=2, lora_dropout=0.1, learning_rate=1e-2, remat="full")
    trainer = Trainer(prepare_model(load_model(TINY), config), config, 20)
    before = {path: np.array(value) for path, value in trainer.frozen.items()}
    assert all("/lora_" in path for path in trainer.trainable) and len(trainer.trainable) == 14
    state, found, rows = trainer.start(), [], Batch(batch(load_model(TINY)), np.ones(2, np.float32))
    for _ in range(20):
        state, report = trainer.step(state, trainer.frozen, rows, max_targets=8)
        found.append(float(report["loss"]))
    assert found[-1] < 0.7 * found[0]
    assert all((before[path] == np.asarray(value)).all() for path, value in trainer.frozen.items())
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * sum(value.size for value in state.trainable.values())


@pytest.mark.slow
def test_adapters_reach_what_all_weights_reach(tmp_path, monkeypatch, capsys):
    """On the sums, after as many steps: LoRA and QLoRA at least what full fine-tuning reaches, but for 2 points."""

    def right(name, *options):
        monkeypatch.setattr("sys.argv", ["sums", "--output", str(tmp_path / name), "--steps", "200", *options])
        sums.main()
        return float(re.search(r"after: ([\d.]+)%", capsys.readouterr().out)[1])

    whole, plain, quantized = right("all", "--train", "all", "--learning-rate", "3e-4"), right("lora"), right("qlora", "--quantize", "nf4")
    assert whole > 10 and min(plain, quantized) >= whole - 2, (whole, plain, quantized)


@pytest.mark.parametrize("options", [[], ["--quantize", "nf4", "--lora-dropout", "0.1"]])
def test_the_command_leaves_an_adapter_that_answers(command, data, tmp_path, options):
    run = tmp_path / "run"
    wanted = ["--steps", 40, "--batch-size", 12, "--learning-rate", 1e-2, "--train", "lora", "--lora-rank", 4, "--export", "huggingface", *options]
    code, _, error = command("finetune", "--data", data, "--validation", data, "--output", run, *wanted)
    assert code == 0, error
    assert losses(run)[-1] < 0.2 * losses(run)[0]
    assert {file.name for file in (run / "adapter").iterdir()} == {peft.CONFIG, peft.WEIGHTS}
    before, merged = weights(TINY), weights(run / "model")
    assert all((before[path] == merged[path]).all() != ("decoder/layers" in path and path.endswith("kernel")) for path in before)
    images = [data.parent / f"{i}.png" for i in range(12)]
    said = {name: pg.load(run / name).generate(images, ["ocr"] * 12) for name in ("adapter", "model")}
    assert said["adapter"] == said["model"] and sum(answer == str(i) for i, answer in enumerate(said["adapter"])) >= 8
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and samples[0]["step"] == 40 and samples[0]["suffix"] == "0"
    if options:
        assert sum(a == str(i) for i, a in enumerate(pg.load(run / "adapter", quantize="nf4").generate(images, ["ocr"] * 12))) >= 8
    code, _, error = command("finetune", "--data", data, "--output", tmp_path / "more", "--model", run / "adapter", "--train", "lora")
    assert code == 2 and "is a LoRA adapter and cannot get another one" in error


def test_lora_and_the_projector(data, tmp_path):
    """What else learned goes into the merged model, quantized or not."""
    config = FinetuneConfig(str(data), str(tmp_path / "run"), steps=2, batch_size=4, learning_rate=1e-2, train=r"projector/.*|.*/lora_[ab]", quantize="nf4")
    assert finetune(config) == tmp_path / "run" / "model"
    before, after = weights(TINY), weights(tmp_path / "run" / "model")
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert "projector/kernel" in changed and "decoder/layers/3/mlp/down/kernel" in changed and not any("vision" in path for path in changed)


def test_a_lora_run_resumes_bit_for_bit(data, tmp_path):
    options = FinetuneConfig(
        str(data), str(tmp_path / "whole"), steps=6, batch_size=4, train="lora", lora_dropout=0.2, quantize="nf4", save_every=3, keep=1,
        learning_rate=1e-2, flip=0.5, crop=0.7, color=0.2,
    )  # fmt: skip
    finetune(options)
    part = replace(options, output=str(tmp_path / "part"))
    stop = lambda self, line, name="log.jsonl": (_ for _ in ()).throw(KeyboardInterrupt) if line["step"] == 5 else log(self, line, name)
    from paligemma_jax.training.runs import Run

    log, Run.log = Run.log, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(part)
    finally:
        Run.log = log
    finetune(replace(part, resume=True))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    whole, continued = ((tmp_path / name / "adapter" / peft.WEIGHTS).read_bytes() for name in ("whole", "part"))
    assert whole == continued


def adapter(folder, change=lambda about: None, factors=None):
    model = load_model(TINY)
    peft.save_adapter(folder, lora.lora_factors(learned(lora.add_lora(model, RANKS, 4.0))) if factors is None else factors, model.config, "tiny")
    about = json.loads((folder / peft.CONFIG).read_text())
    change(about)
    (folder / peft.CONFIG).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda about: about.update(use_dora=True), "is not a plain LoRA adapter: use_dora True"),
        (lambda about: about.update(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda about: about.update(r=7, rank_pattern={}), "has rank"),
        (lambda about: about.update(base_model_name_or_path="nowhere"), "cannot find the base checkpoint of the adapter .*: no such checkpoint: nowhere"),
        (lambda about: about.pop("base_model_name_or_path"), "has no base_model_name_or_path"),
        (lambda about: about.pop("lora_alpha"), "has an invalid r or lora_alpha"),
    ],
)
def test_adapters_of_another_kind(tmp_path, change, expected):
    with pytest.raises(ValueError, match=expected):
        load_model(adapter(tmp_path / "adapter", change))


def test_adapters_that_do_not_fit(tmp_path):
    folder = adapter(
        tmp_path / "one", factors={"decoder/layers/0/attention/q": Factors(np.ones((2, 160), np.float32), np.ones((4, 32, 2), np.float32), 1.0)}
    )
    file = folder / peft.WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"layers.0.", b"layers.9."))
    with pytest.raises(ValueError, match=r"unknown key .*layers\.9\."):
        load_model(folder)
    file.write_bytes(whole.replace(b"q_proj", b"k_proj"))
    with pytest.raises(ValueError, match="which does not fit decoder/layers/0/attention/k"):
        load_model(folder)
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="truncated"):
        load_model(folder)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_model(folder)


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"quantize": "nf4"}, "--train lora adapts them"),
        ({"quantize": "nf4", "train": "projector/.*|decoder/.*/q/kernel"}, "matches decoder/layers/attention/q, which --quantize quantizes"),
        ({"optimizer": "lion"}, "--optimizer must be one of adamw, adafactor, sgd, muon, got lion"),
        ({"reduction": "mean"}, "--reduction must be one of tokens, examples, got mean"),
        ({"export": "onnx"}, "--export must be one of jax, huggingface, big_vision, got onnx"),
        ({"features": "f", "flip": 0.5}, "excludes --flip, --crop and --color"),
        ({"crop": 0.0}, "--crop must be above 0 and at most 1, got 0.0"),
        ({"lora_target": "("}, r"--lora-target must be a regular expression, got '\('"),
        ({"train": "lora", "lora_rank": 0}, "nothing to adapt"),
        ({"train": "all", "features": "f"}, "frozen image encoder"),
    ],
)
def test_choices_that_do_not_go_together(data, tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        finetune(FinetuneConfig(str(data), str(tmp_path / "run"), steps=1, **options))
