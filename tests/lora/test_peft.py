"""Against peft on transformers' model: adapters in both directions, and ten steps of training."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.hf_models import hf_inputs, random_inputs, save_checkpoint
from support.peft_adapters import save_peft
from support.torch_training import PLAIN, ROWS, torch_loss

from convert import peft as adapters
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.parity.case import load_parity_case
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


@pytest.mark.parametrize("kind,dora", [("pg2", True), ("pg1", False)])
def test_peft_loads_our_adapters(random_checkpoint, tmp_path, kind, dora):
    """With DoRA also the projector, a norm and the norms of a layer, which are saved whole."""
    reference, directory, plain = random_checkpoint(kind, 0)
    rng, inputs = np.random.default_rng(0), random_inputs(reference, ROWS, 0)
    target = r".*(attention|mlp)/\w+" if dora else r"projector|.*(attention|mlp)/\w+"
    options = dict(rslora=True, target=target, dora=dora)
    model = lora.add_lora(plain, {"decoder": 4, "vision": 2}, 6.0, **options)
    changed, saved = r".*/lora_b", r"projector/.*|decoder/(layers/1/.*_)?norm/scale"
    values = parameters(model)
    for path, value in values.items():
        if re.fullmatch(rf"{changed}|.*/lora_magnitude|{saved}" if dora else changed, path):
            values[path] = value + jnp.asarray(rng.normal(0, 0.1, value.shape), value.dtype)
    model = with_parameters(model, values.__getitem__)
    adapter, base = tmp_path / "adapter", copy.deepcopy(reference)
    whole = {path: value for path, value in values.items() if dora and re.fullmatch(saved, path)}
    assert len(whole) == (7 if dora else 0)
    factors = lora.lora_factors(model)
    adapters.save_adapter(adapter, factors, model.config, str(directory), whole)
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


@pytest.mark.parametrize("random_start,dora", [(True, False), (False, False), (True, True)])
def test_ten_steps_of_adamw(random_checkpoint, tmp_path, random_start, dora):
    """After ten steps with rate 1e-3, every factor has moved as in torch, to within 1 %.

    From random factors (from peft's own start the first gradient of A is 0), every number is also
    within 1e-4, without the few whose gradient was once a ten-thousandth of the others: such a
    gradient is rounding noise, which Adam turns into full steps, other ones on another processor.
    With DoRA, the projector is trained too.
    """
    reference, _, model = random_checkpoint("pg2", 0)
    torch.manual_seed(0)
    lora_config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(self_attn|mlp)\.\w+_proj",
        init_lora_weights=not random_start,
        use_dora=dora,
        modules_to_save=["multi_modal_projector"] if dora else None,
    )
    torch_model = peft.get_peft_model(copy.deepcopy(reference), lora_config)
    named = {name: p for name, p in torch_model.named_parameters() if p.requires_grad}
    trained = list(named.values())
    fixed = [p for name, p in named.items() if re.search(r"\.bias$|magnitude", name)]
    decayed = [p for p in trained if all(p is not other for other in fixed)]
    groups = [{"params": decayed}, {"params": fixed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    config = replace(PLAIN, train="lora", lora_rank=4, lora_alpha=8.0, dora=dora)
    config = replace(config, modules_to_save="projector" if dora else None)

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
        loaded = adapters.read(tmp_path / "adapter", model.config)
        parts = ("a", "b", "magnitude") if dora else ("a", "b")
        values = {path: tensor.load() for path, tensor in loaded.parameters.items()}
        return values | {
            f"{path}/lora_{n}": getattr(f, n) for path, f in loaded.factors.items() for n in parts
        }

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
            error = error[is_clear[path]]
            assert np.abs(error).max() < 1e-4, path
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


def prompt_tuning(reference, count):
    decoder = reference.config.text_config
    return peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=decoder.hidden_size,
        num_transformer_submodules=1,
        num_attention_heads=decoder.num_attention_heads,
        num_layers=decoder.num_hidden_layers,
    )


def test_a_soft_prompt_of_peft_gives_transformers_logits(random_checkpoint, tmp_path):
    """The vectors precede transformers' embeddings; image and prompt see them both ways."""
    reference, directory, _ = random_checkpoint("pg2", 0)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(copy.deepcopy(reference), prompt_tuning(reference, 3))
    vectors = torch.randn(3, reference.config.text_config.hidden_size)
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(vectors)
    adapter = save_peft(tuned, tmp_path / "adapter", directory)
    model, inputs = load_model(adapter), random_inputs(reference, ROWS, 2, "right")

    def prepend(values, start):
        return np.concatenate([np.broadcast_to(start, (len(values), 3)), values], axis=1)

    ours = replace(
        inputs,
        tokens=prepend(inputs.tokens, np.array(model.config.soft_tokens(3))).astype(np.int32),
        valid=prepend(inputs.valid, True),
        prefix=prepend(inputs.prefix, True),
        targets=prepend(inputs.targets, False),
    )
    batch = hf_inputs(inputs)
    embeddings = reference.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.cat([vectors.expand(len(ROWS), -1, -1), embeddings], 1),
            pixel_values=batch["pixel_values"],
            attention_mask=torch.tensor(ours.valid).long(),
            token_type_ids=torch.tensor(ours.targets).long(),
        ).logits.numpy()[ours.valid]
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(jax_logits(model, ours), expected, atol=atol)
    plain = jax_logits(load_model(directory), inputs)
    without_prompt = expected[prepend(np.ones_like(inputs.valid), False)[ours.valid]]
    assert np.abs(plain - without_prompt).max() > 1


def test_peft_loads_our_soft_prompts(random_checkpoint, tmp_path):
    reference, directory, model = random_checkpoint("pg2", 0)
    vectors = np.random.default_rng(0).normal(size=(5, model.config.decoder.hidden_size))
    vectors = vectors.astype(np.float32)
    adapters.save_adapter(tmp_path / "a", {}, model.config, str(directory), soft_prompt=vectors)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(tmp_path / "a"))
    weight = loaded.prompt_encoder["default"].embedding.weight
    np.testing.assert_array_equal(weight.detach().numpy(), vectors)


def test_parity_refuses_a_soft_prompt(tmp_path):
    config, vectors = load_model("tiny").config, np.ones((4, 160), np.float32)
    adapters.save_adapter(tmp_path / "a", {}, config, "tiny", soft_prompt=vectors)
    with pytest.raises(ValueError, match="a soft prompt, which transformers alone cannot run"):
        load_parity_case(str(tmp_path / "a"))
