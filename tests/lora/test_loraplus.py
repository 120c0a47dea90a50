"""LoRA+ against `create_loraplus_optimizer` of peft."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from support.torch_training import PLAIN

from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.optimizers import make_optimizer, own_optimizer, rate_multiplier

peft = pytest.importorskip("peft", reason="the reference is peft: install the extra test")
optimizers = pytest.importorskip("peft.optimizers")
RATIO = 16.0
# The ends of names in torch and here; the first that matches counts.
NAMES = {
    r"lora_A\.default\.weight": "lora_a",
    r"lora_B\.default\.weight": "lora_b",
    r"lora_magnitude_vector\.default\.weight": "lora_magnitude",
    r"norm\.modules_to_save\.default\.weight": "scale",
    r"weight": "kernel",
    r"bias": "bias",
}


def our_path(name):
    end, ours = next((end, ours) for end, ours in NAMES.items() if re.search(rf"{end}$", name))
    return f"{name.removesuffix(end)}/{ours}"


@pytest.mark.parametrize(
    "dora,decay",
    [
        (False, 0.01),
        (True, 0.0),  # peft decays magnitudes and the norms of Gemma, this project does not
    ],
)
def test_groups_and_updates_are_those_of_peft(random_checkpoint, dora, decay):
    """The same gradients give the same parameters after each of five steps, to 1e-6, or 1e-6 of
    their size above 1 (magnitudes are 20, where float32 has steps of 2e-6)."""
    reference, _, _ = random_checkpoint("pg2", 0)
    lora_config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q|o|up)_proj",
        use_dora=dora,
        modules_to_save=["multi_modal_projector", *(["norm"] if dora else [])],
    )
    model = peft.get_peft_model(copy.deepcopy(reference), lora_config)
    trained = {our_path(name): p for name, p in model.named_parameters() if p.requires_grad}
    rates = dict(lr=1e-3, loraplus_lr_ratio=RATIO, loraplus_weight_decay=decay)
    theirs = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, **rates)
    config = replace(PLAIN, train="lora", loraplus_lr_ratio=RATIO, weight_decay=decay)

    rate = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert len(rate) == len(trained)
    for path, parameter in trained.items():
        assert rate[id(parameter)] == pytest.approx(1e-3 * rate_multiplier(config, path)), path
    assert len({path.rpartition("/")[2] for path in trained}) == (6 if dora else 4)

    ours = make_optimizer(config, 5)
    values = {path: jnp.array(p.detach().numpy()) for path, p in trained.items()}
    state, rng = ours.init(values), np.random.default_rng(0)
    for _ in range(5):
        gradients = {p: rng.normal(0, 1, x.shape).astype("f") for p, x in values.items()}
        for path, parameter in trained.items():
            parameter.grad = torch.tensor(gradients[path])
        theirs.step()
        updates, state = ours.update(gradients, state, values)
        values = optax.apply_updates(values, updates)
        for path, parameter in trained.items():
            np.testing.assert_allclose(values[path], parameter.detach(), atol=1e-6, rtol=1e-6)


def test_the_ratio_is_for_lora_with_our_optimizers():
    with pytest.raises(ValueError, match="--loraplus-lr-ratio requires --train lora, got --train"):
        FinetuneConfig("", "", loraplus_lr_ratio=2.0)
    with pytest.raises(ValueError, match="--loraplus-lr-ratio must be positive and finite, got 0"):
        FinetuneConfig("", "", train="lora", loraplus_lr_ratio=0)
    config = FinetuneConfig("", "", train="lora", loraplus_lr_ratio=2.0)
    with pytest.raises(ValueError, match=r"--loraplus-lr-ratio 2\.0 does not apply to optimizer="):
        own_optimizer(optax.lion, config, 5)
