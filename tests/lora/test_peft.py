"""Against peft on transformers' model: adapters in both directions, and ten steps of training."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.hf_models import hf_inputs, random_inputs, save_checkpoint
from support.torch_training import PLAIN, ROWS, torch_loss

from convert import peft as adapters
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Trainer

peft = pytest.importorskip("peft", reason="the reference is peft: install the extra test")


def jax_logits(model, inputs):
    arguments = inputs.tokens, inputs.images, inputs.valid, inputs.prefix
    return np.asarray(model(*map(jnp.asarray, arguments)))[inputs.valid]


def torch_logits(model, inputs):
    with torch.no_grad():
        return model(**hf_inputs(inputs)).logits.numpy()[inputs.valid]


def save_peft(model, directory, base):
    """Save a peft model as an adapter of the checkpoint `base`."""
    model.save_pretrained(str(directory))
    file = directory / adapters.CONFIG
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("kind", ["pg2", "pg1"])
def test_peft_loads_our_adapters(random_checkpoint, tmp_path, kind):
    reference, directory, plain = random_checkpoint(kind, 0)
    rng, inputs = np.random.default_rng(0), random_inputs(reference, ROWS, 0)
    target = r"projector|.*(attention|mlp)/\w+"
    model = lora.add_lora(plain, {"decoder": 4, "vision": 2}, 6.0, rslora=True, target=target)
    values = parameters(model)
    for path, value in values.items():
        if path.endswith("lora_b"):
            values[path] = jnp.asarray(rng.normal(0, 0.1, value.shape), value.dtype)
    model = with_parameters(model, values.__getitem__)
    adapter, base = tmp_path / "adapter", copy.deepcopy(reference)
    adapters.save_adapter(adapter, lora.lora_factors(model), model.config, str(directory))
    loaded = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    assert all(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)
    expected = jax_logits(model, inputs)
    assert np.abs(expected - jax_logits(plain, inputs)).max() > 1
    np.testing.assert_allclose(torch_logits(loaded, inputs), expected, atol=2e-4)
    np.testing.assert_allclose(jax_logits(load_model(adapter), inputs), expected, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=4, target_modules="all-linear"),
        dict(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "down_proj", "fc1"],
            rank_pattern={"q_proj": 5},
            alpha_pattern={"layers.1.self_attn.q_proj": 20},
        ),
        dict(r=2, use_rslora=True, target_modules=r".*language_model.*\.(o_proj|gate_proj)"),
    ],
)
def test_we_load_adapters_of_peft(random_checkpoint, tmp_path, options):
    reference, directory, plain = random_checkpoint("pg2", 0)
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    model = peft.get_peft_model(copy.deepcopy(reference), config).eval()
    adapter = save_peft(model, tmp_path / "adapter", directory)
    inputs = random_inputs(reference, ROWS, 1)
    logits, expected = jax_logits(load_model(adapter), inputs), torch_logits(model, inputs)
    assert np.abs(expected - jax_logits(plain, inputs)).max() > 1
    atol = 2e-4 * max(1, np.abs(expected).max() / 10)
    np.testing.assert_allclose(logits, expected, atol=atol)


@pytest.mark.parametrize("random_start", [True, False])
def test_ten_steps_of_adamw(random_checkpoint, tmp_path, random_start):
    """After ten steps with rate 1e-3, every factor has moved as in torch, to within 1 %.

    From random factors (from peft's own start the first gradient of A is 0), every number is also
    within 1e-4, except the few whose gradient was once a ten-thousandth of the others: such a
    gradient is rounding noise, which Adam turns into full steps.
    """
    reference, _, model = random_checkpoint("pg2", 0)
    torch.manual_seed(0)
    lora_config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(self_attn|mlp)\.\w+_proj",
        init_lora_weights=not random_start,
    )
    torch_model = peft.get_peft_model(copy.deepcopy(reference), lora_config)
    trained = [p for p in torch_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    config = replace(PLAIN, train="lora", lora_rank=4, lora_alpha=8.0)

    def assign(values):
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)

    def to_jax(values):
        """Values of `trained` by the paths and in the layouts of our factors."""
        kept = [p.detach().clone() for p in trained]
        assign(values)
        torch_model.save_pretrained(str(tmp_path / "adapter"))
        assign(kept)
        loaded = adapters.load_adapter(tmp_path / "adapter", model.config)
        return {f"{path}/lora_{n}": getattr(f, n) for path, f in loaded.items() for n in "ab"}

    start = to_jax(trained)
    prepared = prepare_model(model, config)
    values = parameters(prepared) | jax.tree.map(jnp.asarray, start)
    trainer = Trainer(with_parameters(prepared, values.__getitem__), config, 10)
    state = trainer.start()
    assert set(trainer.trainable) == set(start)
    is_clear = dict.fromkeys(start, True)  # where the gradient never was rounding noise
    for step in range(10):
        inputs = random_inputs(reference, ROWS, step, "right")
        loss = torch_loss(torch_model, inputs)
        optimizer.zero_grad()
        loss.backward()
        for path, gradient in to_jax([p.grad for p in trained]).items():
            magnitude = np.abs(gradient)
            is_clear[path] = is_clear[path] & (magnitude > 1e-4 * magnitude.max())
        optimizer.step()
        batch = Batch(inputs, np.ones(4, np.float32))
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=12)
        assert float(report["loss"]) == pytest.approx(loss.item(), rel=1e-4)
    for path, expected in to_jax(trained).items():
        error = np.asarray(state.trainable[path]) - expected
        if random_start:
            assert is_clear[path].mean() > 0.9
            assert np.abs(error[is_clear[path]]).max() < 1e-4, path
        moved = np.linalg.norm(expected - start[path])
        assert moved > 1e-3 and np.linalg.norm(error) < 1e-2 * moved


def test_the_base_may_be_a_checkpoint_that_transformers_saved(random_checkpoint, tmp_path):
    """The base has the parameter names of release 5, which differ from the released checkpoints."""
    reference, _, _ = random_checkpoint("pg2", 0)
    base = save_checkpoint(reference, tmp_path / "base", layout="v5")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(reference), config)
    adapter = save_peft(model, tmp_path / "adapter", base)
    inputs = random_inputs(reference, ROWS, 2)
    expected = torch_logits(model.eval(), inputs)
    np.testing.assert_allclose(jax_logits(load_model(adapter), inputs), expected, atol=4e-4)
