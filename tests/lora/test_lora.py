"""LoRA and QLoRA without torch: the modules, training, runs of the command, damaged adapters."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.finetuning import losses, read_log, small_config, weights
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
from paligemma_jax.training.runs import Run
from paligemma_jax.training.trainer import Trainer

RANKS = {"decoder": 2, "vision": 3}


def with_random_b(model, seed=0):
    """Return the model with random B, which is 0 initially, so that its adapters have an effect;
    and with random changes of its magnitudes, if any."""
    rng = np.random.default_rng(seed)
    values = parameters(model)
    for path, value in values.items():
        if path.endswith("lora_b"):
            values[path] = jnp.asarray(rng.normal(0, 0.1, value.shape), jnp.float32)
        elif path.endswith("lora_magnitude"):
            values[path] = value * rng.uniform(0.8, 1.2, value.shape).astype(np.float32)
    return with_parameters(model, values.__getitem__)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_adds_nothing_and_a_merged_model_computes_the_same(dora):
    plain = load_model(TINY)
    model = lora.add_lora(plain, RANKS, 4.0, dora=dora)
    np.testing.assert_allclose(logits(model), logits(plain), atol=2e-4 if dora else 0)
    model = with_random_b(model)
    assert np.abs(logits(model) - logits(plain)).max() > 0.1
    merged = lora.merge_lora(model)
    assert parameters(merged).keys() == parameters(plain).keys()
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-4)
    if dora:
        with pytest.raises(ValueError, match=r"magnitudes \(DoRA\) cannot be unmerged"):
            lora.unmerge_lora(merged, lora.lora_factors(model))
        return
    unmerged = lora.unmerge_lora(merged, lora.lora_factors(model))
    np.testing.assert_allclose(logits(unmerged), logits(plain), atol=2e-4)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.thorough
def test_lists_and_stacks_of_layers_are_equivalent(kind):
    model = load_model(TINY)
    model = quantize_model(model, kind) if kind else model
    listed = with_random_b(lora.add_lora(model, RANKS, 4.0, dora=kind != "int8"))
    stacked = stack_model(listed, delete=False)
    np.testing.assert_allclose(logits(stacked), logits(listed), atol=1e-4)
    factors, expected = lora.lora_factors(stacked), lora.lora_factors(listed)
    assert factors.keys() == expected.keys() and len(factors) == 4 * 7 + 4 * 6
    for path, adapter in factors.items():
        np.testing.assert_array_equal(adapter.a, expected[path].a)
        np.testing.assert_array_equal(adapter.b, expected[path].b)
        np.testing.assert_array_equal(adapter.magnitude, expected[path].magnitude)
    assert parameters(unstack_model(stacked)).keys() == parameters(listed).keys()


def test_ranks_scales_and_targets():
    model = load_model(TINY)

    def factors(rank, **options):
        return lora.lora_factors(lora.add_lora(model, rank, 8.0, **options))

    chosen = factors(RANKS, rslora=True, target=r".*attention/[qv]")
    assert len(chosen) == 16
    ranks = {path.split("/")[0]: len(adapter.a) for path, adapter in chosen.items()}
    assert ranks == RANKS
    scales = {adapter.scale for path, adapter in chosen.items() if path.startswith("decoder")}
    assert scales == {8 / math.sqrt(2)}
    assert not any(path.startswith("vision") for path in factors({"decoder": 2}))
    assert "projector" in factors(RANKS, target=r"projector|.*attention/q")
    a, bound = chosen["decoder/layers/0/attention/q"].a, 160**-0.5
    assert np.abs(a).max() <= bound
    assert np.abs(a).std() == pytest.approx(bound / 12**0.5, rel=0.1)
    with pytest.raises(ValueError, match="nothing to adapt"):
        factors(RANKS, target="nothing")


@pytest.mark.parametrize("preset", ["3b-224", pytest.param("28b-896", marks=pytest.mark.slow)])
def test_an_adapter_is_a_small_part_of_the_model(preset):
    """At the default rank, and rank 8 in the encoder, it has less than 2 % of the bytes, although
    it is float32 and the model bfloat16."""
    config = FinetuneConfig("", "", train="lora", lora_vision_rank=8)
    model = abstract_model_by_name(preset, "bfloat16")
    adapted = jax.eval_shape(lambda model: prepare_model(model, config), model)

    def nbytes(model, suffix):
        values = parameters(model).items()
        return sum(v.size * v.dtype.itemsize for path, v in values if re.search(suffix, path))

    assert 0 < nbytes(adapted, "/lora_[ab]$") < 0.02 * nbytes(model, "")


def test_dropout_applies_inside_its_context_and_differs_between_layers():
    model = lora.add_lora(stack_model(load_model(TINY)), {"decoder": 2}, 4.0, dropout=0.5)
    model = with_random_b(model)
    plain = logits(model)
    np.testing.assert_array_equal(logits(model), plain)
    inputs = jax.tree.map(jnp.asarray, batch(model))

    @jax.jit
    def dropped(key):
        with lora.lora_dropout(key):
            return model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)

    first, second = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(dropped(jax.random.key(0)), first)
    values = parameters(model).items()
    seeds = np.concatenate([value for path, value in values if path.endswith("/seed")])
    assert len(set(seeds)) == 7 * 4


@pytest.mark.parametrize("quantized", [None, "nf4", "int8"])
@pytest.mark.thorough
def test_only_the_factors_are_trained(quantized):
    config = FinetuneConfig(
        "",
        "",
        batch_size=2,
        train="lora",
        quantize=quantized,
        lora_rank=2,
        lora_dropout=0.1,
        learning_rate=1e-2,
        remat="full",
    )
    trainer = Trainer(prepare_model(load_model(TINY), config), config, 20)
    before = {path: np.array(value) for path, value in trainer.frozen.items()}
    assert all("/lora_" in path for path in trainer.trainable) and len(trainer.trainable) == 14
    state, losses = trainer.start(), []
    data = Batch(batch(load_model(TINY)), np.ones(2, np.float32))
    for _ in range(20):
        state, report = trainer.step(state, trainer.frozen, data, max_targets=8)
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    for path, value in trainer.frozen.items():
        np.testing.assert_array_equal(before[path], value, err_msg=path)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    trainable = sum(value.size for value in state.trainable.values())
    assert sum(m.size for m in moments) == 2 * trainable


@pytest.mark.slow
def test_adapters_reach_the_accuracy_of_full_fine_tuning(tmp_path, monkeypatch, capsys):
    """On sums, after the same number of steps, LoRA and QLoRA are at most 2 points below it."""

    def accuracy(name, *options):
        arguments = ["sums", "--output", str(tmp_path / name), "--steps", "200", *options]
        monkeypatch.setattr("sys.argv", arguments)
        sums.main()
        return float(re.search(r"after: ([\d.]+)%", capsys.readouterr().out)[1])

    full = accuracy("all", "--train", "all", "--learning-rate", "3e-4")
    adapters = accuracy("lora"), accuracy("qlora", "--quantize", "nf4")
    assert full > 10 and min(adapters) >= full - 2, (full, adapters)


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(
            ["--quantize", "nf4", "--lora-dropout", "0.1", "--dora"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_command_trains_and_merges_an_adapter(command, data, tmp_path, options):
    run = tmp_path / "run"
    train = ["--train", "lora", "--data", data]
    options = ["--steps", 40, "--batch-size", 12, "--learning-rate", 1e-2, *options]
    options += ["--lora-rank", 4, "--export", "huggingface", "--validation", data]
    code, _, error = command("finetune", *train, *options, "--output", run)
    assert code == 0, error
    assert losses(run)[-1] < 0.2 * losses(run)[0]
    assert {file.name for file in (run / "adapter").iterdir()} == {peft.CONFIG, peft.WEIGHTS}
    before, merged = weights(TINY), weights(run / "model")
    for path in before:
        adapted = "decoder/layers" in path and path.endswith("kernel")
        assert (before[path] == merged[path]).all() != adapted, path
    images = [data.parent / f"{i}.png" for i in range(12)]

    def answers(name, **options):
        return pg.load(run / name, **options).generate(images, ["ocr"] * 12)

    def correct(answers):
        return sum(answer == str(i) for i, answer in enumerate(answers))

    assert answers("adapter") == answers("model") and correct(answers("adapter")) >= 8
    samples = read_log(run, "samples.jsonl")
    assert len(samples) == 4 and samples[0]["step"] == 40 and samples[0]["suffix"] == "0"
    if "nf4" in options:
        assert correct(answers("adapter", quantize="nf4")) >= 8
    other = ["--output", tmp_path / "other", "--model", run / "adapter"]
    code, _, error = command("finetune", *train, *other)
    assert code == 2 and "is a LoRA adapter and cannot get a second one" in error


def test_lora_and_the_projector_are_trained_together(data, tmp_path):
    """The result is a merged model, even if the base is quantized."""
    run = tmp_path / "run"
    options = dict(train=r"projector/.*|.*/lora_[ab]", quantize="nf4", learning_rate=1e-2)
    assert finetune(small_config(data, run, steps=2, **options)) == run / "model"
    before, after = weights(TINY), weights(run / "model")
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert {"projector/kernel", "decoder/layers/3/mlp/down/kernel"} <= changed
    assert not any("vision" in path for path in changed)


@pytest.mark.thorough
def test_an_interrupted_lora_run_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    full, part, log = tmp_path / "full", tmp_path / "part", Run.log
    config = small_config(
        data,
        full,
        steps=6,
        train="lora",
        lora_dropout=0.2,
        quantize="nf4",
        dora=True,
        modules_to_save="projector|decoder/layers/pre_mlp_norm",
        save_every=3,
        keep=1,
        learning_rate=1e-2,
        flip=0.5,
        crop=0.7,
        color=0.2,
    )
    finetune(config)

    def interrupt(self, line, name="log.jsonl"):
        if line["step"] == 5:
            raise KeyboardInterrupt
        log(self, line, name)

    config = replace(config, output=str(part))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", interrupt)
        finetune(config)
    finetune(replace(config, resume=True))
    assert losses(part) == losses(full)
    adapters = [(run / "adapter" / peft.WEIGHTS).read_bytes() for run in (full, part)]
    assert adapters[0] == adapters[1]
    trained, base = peft.read(full / "adapter", load_model(TINY).config), weights(TINY)
    assert len(trained.parameters) == 6 and len(trained.factors) == 28
    for path, tensor in trained.parameters.items():
        assert (tensor.numpy() != base[path]).any(), path


def save_adapter(folder, edit=lambda settings: None, factors=None):
    """An adapter of tiny, its adapter_config.json changed by `edit`."""
    model = load_model(TINY)
    if factors is None:
        factors = lora.lora_factors(with_random_b(lora.add_lora(model, RANKS, 4.0)))
    peft.save_adapter(folder, factors, model.config, "tiny")
    settings = json.loads((folder / peft.CONFIG).read_text())
    edit(settings)
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "edit,message",
    [
        (
            lambda settings: settings.update(use_dora=True),
            "needs lora_A and lora_B of the same rank, and a lora_magnitude_vector",
        ),
        (lambda settings: settings.update(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda settings: settings.update(r=7, rank_pattern={}), "must have rank 7, but"),
        (
            lambda settings: settings.update(base_model_name_or_path="nowhere"),
            "cannot find the base checkpoint of the adapter .*: no such checkpoint: nowhere",
        ),
        (
            lambda settings: settings.pop("base_model_name_or_path"),
            "base_model_name_or_path must name the base checkpoint, got null; give .* --base",
        ),
        (lambda settings: settings.pop("lora_alpha"), "json: lora_alpha is missing"),
        (lambda settings: settings.update(lora_alpha="8"), "lora_alpha must be a number, got '8'"),
        (lambda settings: settings.update(bias="all"), "bias 'all' is not supported; merge"),
        (lambda settings: settings.update(lora_bias=True), "lora_bias true is not supported; only"),
        (lambda settings: settings.update(news=[1]), "news an array of 1 item is not supported"),
        (lambda settings: settings.update(peft_type="IA3"), "peft_type must be LORA, .*'IA3'"),
    ],
)
def test_unsupported_adapters_are_refused(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_model(save_adapter(tmp_path / "adapter", edit))


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    a, b = np.ones((2, 160), np.float32), np.ones((4, 32, 2), np.float32)
    factors = {"decoder/layers/0/attention/q": Factors(a, b, 1.0)}
    folder = save_adapter(tmp_path / "adapter", factors=factors)
    file = folder / peft.WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content.replace(b"layers.0.", b"layers.9."))
    with pytest.raises(ValueError, match=r"unknown key .*layers\.9\."):
        load_model(folder)
    file.write_bytes(content.replace(b"q_proj", b"k_proj"))
    with pytest.raises(ValueError, match="which does not fit decoder/layers/0/attention/k"):
        load_model(folder)
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="truncated"):
        load_model(folder)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_model(folder)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"quantize": "nf4"}, "--train lora adapts them"),
        (
            {"quantize": "nf4", "train": "projector/.*|decoder/.*/q/kernel"},
            "matches decoder/layers/attention/q, which is quantized by --quantize",
        ),
        ({"optimizer": "lion"}, "--optimizer must be one of adamw, adafactor, sgd, muon, got lion"),
        ({"reduction": "mean"}, "--reduction must be one of tokens, examples, got mean"),
        ({"export": "onnx"}, "--export must be one of jax, huggingface, big_vision, got onnx"),
        ({"features": "f", "flip": 0.5}, "cannot be combined with --flip, --crop or --color"),
        ({"crop": 0.0}, "--crop must be above 0 and at most 1, got 0.0"),
        ({"lora_target": "("}, r"--lora-target must be a regular expression, got '\('"),
        ({"train": "lora", "lora_rank": 0}, "nothing to adapt"),
        ({"dora": True}, "--dora requires --train lora, got --train all"),
        ({"train": "lora", "modules_to_save": "proj"}, "--modules-to-save proj matches no module"),
        ({"train": "lora", "modules_to_save": "decoder/.*/q"}, "only modules that LoRA adapts"),
        ({"train": "lora", "modules_to_save": "("}, "--modules-to-save must be a regular"),
        ({"train": "all", "features": "f"}, "frozen image encoder"),
    ],
)
def test_conflicting_options_are_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(small_config(data, tmp_path / "run", steps=1, **options))
