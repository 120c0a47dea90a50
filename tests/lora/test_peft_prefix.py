"""Prefix tuning against peft and transformers: what a prefix computes, and adapters in both
directions."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.hf_models import hf_inputs, random_inputs
from support.peft_adapters import save_peft
from support.torch_training import ROWS

from convert import peft as adapters
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.prefix import prefix_of, with_prefix
from paligemma_jax.model.stack import stack_model

peft = pytest.importorskip("peft", reason="the reference is peft: install the extra test")
P = 3  # soft tokens


def tuned_model(reference, **options):
    """peft's model; its settings for the decoder are its own defaults."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options)
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(reference), config).eval()


def prepend(values, start):
    return np.concatenate([np.broadcast_to(start, (len(values), P)), values], axis=1)


def logits(model, inputs, causal=False):
    """Of the valid tokens of the rows."""
    tokens = prepend(inputs.tokens, np.array(model.config.soft_tokens(P))).astype(np.int32)
    valid, prefix = prepend(inputs.valid, True), prepend(inputs.prefix, True) & (not causal)
    out = model(*map(jnp.asarray, (tokens, inputs.images, valid, prefix)))
    return np.asarray(out)[:, P:][inputs.valid]


def close(ours, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{}, dict(prefix_projection=True, encoder_hidden_size=24)])
@pytest.mark.parametrize("kind", ["pg1", "pg2"])
def test_a_prefix_of_peft_gives_its_logits(random_checkpoint, tmp_path, kind, options):
    """peft drops the token types, so that its rows are causal."""
    reference, directory, _ = random_checkpoint(kind, 0)
    tuned = tuned_model(reference, **options)
    model = load_model(save_peft(tuned, tmp_path / "adapter", directory))
    inputs = random_inputs(reference, ROWS, 2, "right")
    with torch.no_grad():
        expected = tuned(**hf_inputs(inputs)).logits[torch.tensor(inputs.valid)]
    close(logits(model, inputs, causal=True), expected)
    plain = with_prefix(model, np.zeros_like(prefix_of(model)))
    assert np.abs(logits(plain, inputs, causal=True) - expected.numpy()).max() > 1


@pytest.mark.parametrize("layers", ["list", "stack"])
def test_image_and_prompt_see_each_other_and_the_prefix(random_checkpoint, layers):
    """As transformers computes it from peft's cache, with the token types."""
    reference, _, model = random_checkpoint("pg2", 0)
    tuned = tuned_model(reference)
    weight = tuned.prompt_encoder["default"].embedding.weight
    decoder = model.config.decoder
    shape = P, decoder.num_hidden_layers, 2, decoder.num_key_value_heads, decoder.head_dim
    model = stack_model(model, False) if layers == "stack" else model
    model = with_prefix(model, weight.detach().numpy().reshape(shape))
    np.testing.assert_array_equal(prefix_of(model), weight.detach().numpy().reshape(shape))
    inputs = random_inputs(reference, ROWS, 2, "right")
    batch = hf_inputs(inputs)
    types = torch.cat([torch.zeros(len(ROWS), P).long(), batch["token_type_ids"]], 1)
    with torch.no_grad():
        expected = reference(
            **batch
            | dict(
                past_key_values=tuned.get_prompt(len(ROWS)),
                attention_mask=torch.tensor(prepend(inputs.valid, True)).long(),
                token_type_ids=types,
            )
        ).logits[torch.tensor(inputs.valid)]
    close(logits(model, inputs), expected)


def test_peft_loads_our_prefixes(random_checkpoint, tmp_path):
    reference, directory, model = random_checkpoint("pg2", 0)
    decoder = model.config.decoder
    shape = P, decoder.num_hidden_layers, 2, decoder.num_key_value_heads, decoder.head_dim
    prefix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapters.save_adapter(adapter, {}, model.config, str(directory), prefix=prefix)
    np.testing.assert_array_equal(adapters.read(adapter, model.config).prefix, prefix)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(reference), str(adapter))
    inputs = random_inputs(reference, ROWS, 2, "right")
    with torch.no_grad():
        expected = loaded(**hf_inputs(inputs)).logits[torch.tensor(inputs.valid)]
    close(logits(load_model(adapter), inputs, causal=True), expected)
