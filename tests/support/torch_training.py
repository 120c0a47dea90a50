"""The training loss in torch, and a configuration that torch.optim.AdamW can follow."""

from __future__ import annotations

import numpy as np
import torch
from support.hf_models import hf_inputs
from transformers.loss.loss_utils import ForCausalLMLoss

from paligemma_jax.training.config import FinetuneConfig

ROWS = ((1, 5, 12), (1, 3, 4), (1, 7, 9), (1, 4, 6))  # for `random_inputs`

PLAIN = FinetuneConfig(
    data="",
    output="",
    learning_rate=1e-3,
    schedule="constant",
    warmup=0,
    clip=0,
    weight_decay=0.01,
    layers="list",
    batch_size=4,
)


def torch_loss(model, inputs, smoothing=0.0):
    """The loss that transformers computes, with optional label smoothing."""
    logits = model(**hf_inputs(inputs)).logits
    labels = torch.tensor(np.where(inputs.targets, inputs.tokens, -100)).long()
    if not smoothing:
        return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(*flat, label_smoothing=smoothing)
