"""The small random checkpoint and inputs of the goldens in tests/golden/engines."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from convert import huggingface
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.synthetic import synthetic_inputs
from paligemma_jax.inference.scoring import forward
from paligemma_jax.model.config import DecoderConfig, PaliGemmaConfig, VisionConfig
from paligemma_jax.parity.case import ParityCase, random_case
from paligemma_jax.parity.random_weights import random_checkpoint

CONFIG = PaliGemmaConfig(
    vision=VisionConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=88,
        image_size=56,
    ),
    decoder=DecoderConfig(
        hidden_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=320,
        query_pre_attn_scalar=12,
        sliding_window=20,
    ),
    image_token_id=300,
)


# big_vision scales by a head's size, or by the width over the number of heads.
BIG_VISION_CONFIG = replace(CONFIG, decoder=replace(CONFIG.decoder, query_pre_attn_scalar=14))


def write_checkpoint(directory, config=CONFIG):
    huggingface.write(directory, random_checkpoint(config))
    return directory


def image_first_case(config, new):
    """Two rows of an image, 8 tokens of prompt and `new` of answer."""
    inputs = synthetic_inputs(config, 2, 8 + new, 0)
    targets = np.broadcast_to(np.arange(inputs.tokens.shape[1]) >= 16 + 8, inputs.tokens.shape)
    inputs = replace(inputs, prefix=~targets, targets=targets)
    names = ("tokens", "valid", "prefix", "targets")
    prompts = replace(inputs, **{name: getattr(inputs, name)[:, : 16 + 8] for name in names})
    return ParityCase(random_checkpoint(config), inputs, prompts)


def image_first_outputs(model, case, tokens):
    """Logits of a teacher-forced pass, and after the prompt and each of `tokens` [B, N]."""
    inputs, prompts = case.inputs, case.prompts
    found = {"labels/logits": forward(model, inputs)}
    features = model.encode_images(jnp.asarray(inputs.images))
    prompt = (prompts.tokens, features, prompts.valid, prompts.prefix)
    slots = prompts.tokens.shape[1] + tokens.shape[1]
    prefill = jax.jit(type(model).prefill, static_argnames="slots")
    found["prefill"], cache = prefill(model, *prompt, slots=slots)
    step, steps = jax.jit(type(model).decode_step), []
    for token in tokens.T[:-1]:
        logits, cache = step(model, jnp.asarray(token), cache)
        steps.append(logits)
    found["decode"] = jnp.stack(steps, axis=1)
    rows = model.config.image_token_id  # other programs' tables end before the image token
    return {name: np.asarray(value)[..., :rows] for name, value in found.items()}


def golden_distances(checkpoint, profile, case, golden):
    """The largest difference of each output of a profile from the golden outputs of an engine."""
    model = load_model(checkpoint, "float32", profile)
    outputs = image_first_outputs(model, case, golden["tokens"])
    return {name: float(np.abs(value - golden[name]).max()) for name, value in outputs.items()}


def identifiable(file, case, logits):
    """Write logits and inputs as `--identify` reads them."""
    names = ("tokens", "valid", "targets", "images")
    np.savez(file, logits=logits, **{name: getattr(case.inputs, name) for name in names})
    return str(file)


def golden_inputs(file):
    """The inputs of a golden file as `Inputs`: two rows of 24 tokens of prompt and 6 of answer."""
    case = random_case(CONFIG, 8, 6)
    with np.load(file) as content:
        arrays = {name: content[name] for name in ("tokens", "valid", "targets", "images")}
    return replace(case.inputs, **arrays, prefix=~arrays["targets"])
