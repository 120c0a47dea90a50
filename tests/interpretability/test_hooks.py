"""Details and interventions against hooks on transformers' modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.decoding import tokens_of
from support.hf_models import hf_inputs, hf_logits, random_inputs

import paligemma_jax.inference.scoring as scoring
from paligemma_jax.model.edits import AblateHeads, Add, Edits, Scale

ROWS = ((1, 5, 12), (1, 3, 4))
DETAILS = r"(vision|decoder)/layers/\d+/(attention/([qkv]|heads)|mlp/activations)"


@pytest.fixture(scope="module")
def case(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 1)
    return reference, model, random_inputs(reference, ROWS, 1)


def towers(reference):
    """(tower, its layers, names of the output projections of attention and MLP)."""
    vision = reference.model.vision_tower
    vision = getattr(vision, "vision_model", vision)
    yield "vision", vision.encoder.layers, "out_proj", "fc2"
    yield "decoder", reference.model.language_model.layers, "o_proj", "down_proj"


def test_every_detail_is_that_of_a_hook(case):
    reference, model, inputs = case
    expected, hooks = {}, []

    def keep(name):
        return lambda _, args, out: expected.__setitem__(name, out.numpy())

    def keep_input(name):
        return lambda _, args: expected.__setitem__(name, args[0].numpy())

    for tower, layers, attention_out, mlp_out in towers(reference):
        for i, layer in enumerate(layers):
            path = f"{tower}/layers/{i}"
            for name in "qkv":
                project = getattr(layer.self_attn, f"{name}_proj")
                hooks.append(project.register_forward_hook(keep(f"{path}/attention/{name}")))
            out, down = getattr(layer.self_attn, attention_out), getattr(layer.mlp, mlp_out)
            hooks.append(out.register_forward_pre_hook(keep_input(f"{path}/attention/heads")))
            hooks.append(down.register_forward_pre_hook(keep_input(f"{path}/mlp/activations")))
    with torch.no_grad():
        reference(**hf_inputs(inputs))
    for hook in hooks:
        hook.remove()
    actual = scoring.forward_stages(model, inputs, only=(DETAILS,))
    assert {*actual} == {*expected}
    for name, value in actual.items():
        value, target = np.asarray(value), expected[name].reshape(value.shape)
        if name.startswith("decoder"):
            value, target = value[inputs.valid], target[inputs.valid]
        assert np.abs(value - target).max() < 1e-5 * max(np.abs(target).max(), 1), name


@pytest.fixture
def hook(case):
    """(layer, part, change) -> our edit; the same change is hooked into transformers."""
    reference, handles = case[0], []

    def add(layer, part, change):
        block = reference.model.language_model.layers[layer]
        if part == "attention/heads":
            module = block.self_attn.o_proj
            handles.append(module.register_forward_pre_hook(lambda _, args: (change(args[0]),)))
        else:
            module = {
                "mlp/output": block.post_feedforward_layernorm,
                "attention/output": block.post_attention_layernorm,
                "": block,
            }[part]
            handles.append(
                module.register_forward_hook(
                    lambda _, __, out: (
                        (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
                    )
                )
            )
        return f"decoder/layers/{layer}/{part}".rstrip("/")

    yield add
    for handle in handles:
        handle.remove()


def without_head(x):
    """The joined heads [B, T, N * H] with head 1 zero."""
    x = x.clone()
    H = x.shape[-1] // 4
    x[..., H : 2 * H] = 0
    return x


@pytest.mark.parametrize("kind", ["mlp", "heads", "steer"])
def test_an_intervention_is_that_of_a_hook(case, hook, kind):
    """Logits within 1e-5 of the largest, and greedy tokens equal, with and without the edit
    different."""
    reference, model, inputs = case
    heads = reference.config.text_config.num_attention_heads
    direction = np.random.default_rng(0).normal(size=reference.config.text_config.hidden_size)
    direction = direction.astype(np.float32)
    if kind == "heads":
        assert heads == 4
    edit = {
        "mlp": lambda: {hook(0, "mlp/output", lambda x: 0 * x): Scale(0)},
        "heads": lambda: {hook(1, "attention/heads", without_head): AblateHeads((1,))},
        "steer": lambda: {hook(0, "", lambda x: x + torch.tensor(direction)): Add(direction)},
    }[kind]()
    expected = hf_logits(reference, inputs)[inputs.valid]
    actual = np.asarray(scoring.forward(model, inputs, Edits.of(edit)))[inputs.valid]
    unedited = np.asarray(scoring.forward(model, inputs))[inputs.valid]
    assert np.abs(actual - expected).max() < 1.2e-5 * np.abs(expected).max()
    assert np.abs(unedited - expected).max() > 1e-2
    prompt = random_inputs(reference, ((1, 5, 0), (1, 3, 0)), 1)
    tokens = reference.generate(
        **hf_inputs(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )[:, prompt.tokens.shape[1] :].numpy()
    mine = tokens_of(model, prompt, 6, edit=edit)
    eos = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    np.testing.assert_array_equal(mine[~eos], tokens[~eos])
