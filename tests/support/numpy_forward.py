"""PaliGemma's forward pass in numpy and float64, one row at a time, written from the formulas of
transformers 5.23 without this project's model."""

from __future__ import annotations

import numpy as np


def forward(parameters: dict, config, inputs) -> np.ndarray:
    """Teacher-forced logits float64[B, T, V]; those at pads are 0.

    Args:
        parameters: Arrays by the paths of this project's parameters.
        config: A `PaliGemmaConfig` with the numerics of transformers.
        inputs: As for the model, with images [M, S, S, 3].
    """
    p = {path: np.asarray(value, np.float64) for path, value in parameters.items()}
    features = iter([encode(p, config.vision, np.float64(image)) for image in inputs.images])
    logits = np.zeros((*inputs.tokens.shape, config.decoder.vocab_size))
    for row, valid in enumerate(inputs.valid):
        tokens, prefix = inputs.tokens[row, valid], inputs.prefix[row, valid]
        is_image = tokens == config.image_token_id
        x = p["decoder/embedder/table"][np.where(is_image, 0, tokens)]
        x = x * config.decoder.hidden_size**0.5
        count = is_image.sum() // config.vision.num_patches
        if count:
            x[is_image] = np.concatenate([next(features) for _ in range(count)])
        logits[row, valid] = decode(p, config.decoder, x, prefix)
    return logits


def encode(p: dict, config, image: np.ndarray) -> np.ndarray:
    """The projected features [P, D] of one image [S, S, 3]."""
    size, side = config.patch_size, config.image_size // config.patch_size
    x = np.stack(
        [
            image[i * size : (i + 1) * size, j * size : (j + 1) * size].reshape(-1)
            for i in range(side)
            for j in range(side)
        ]
    )
    x = x @ p["vision/patch/kernel"].T + p["vision/patch/bias"] + p["vision/position"]
    for i in range(config.num_hidden_layers):
        part = at(p, f"vision/layers/{i}/")
        y = layer_norm(x, at(part, "pre_attention_norm/"), config.layer_norm_eps)
        q, k, v = (
            np.einsum("tw,nhw->nth", y, part[f"attention/{name}/kernel"])
            + part[f"attention/{name}/bias"][:, None]
            for name in "qkv"
        )
        heads = softmax(q @ k.swapaxes(1, 2) * config.head_dim**-0.5) @ v
        x = x + np.einsum("nth,wnh->tw", heads, part["attention/o/kernel"])
        x = x + part["attention/o/bias"]
        y = layer_norm(x, at(part, "pre_mlp_norm/"), config.layer_norm_eps)
        y = gelu_tanh(y @ part["mlp/up/kernel"].T + part["mlp/up/bias"])
        x = x + y @ part["mlp/down/kernel"].T + part["mlp/down/bias"]
    x = layer_norm(x, at(p, "vision/norm/"), config.layer_norm_eps)
    return x @ p["projector/kernel"].T + p["projector/bias"]


def decode(p: dict, config, x: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """The logits [T, V] of a row's embeddings [T, D] without pads."""
    is_gemma2, eps, T = config.model_type == "gemma2", config.rms_norm_eps, len(x)
    group = config.num_attention_heads // config.num_key_value_heads
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    block = prefix[:, None] & prefix[None]
    for i in range(config.num_hidden_layers):
        part = at(p, f"decoder/layers/{i}/")
        y = rms_norm(x, part["pre_attention_norm/scale"], eps)
        q, k, v = (np.einsum("td,nhd->nth", y, part[f"attention/{name}/kernel"]) for name in "qkv")
        q, k = (rotate(z, 1 + np.arange(T), config.rope_theta) for z in (q, k))
        k, v = (np.repeat(z, group, axis=0) for z in (k, v))
        scores = q @ k.swapaxes(1, 2) * config.query_pre_attn_scalar**-0.5
        scores = cap(scores, config.attn_logit_softcapping)
        allowed = key <= query
        if config.sliding_window and i % 2 == 0:
            allowed = allowed & (key > query - config.sliding_window)
        heads = softmax(np.where(allowed | block, scores, -np.inf)) @ v
        y = np.einsum("nth,dnh->td", heads, part["attention/o/kernel"])
        x = x + (rms_norm(y, part["post_attention_norm/scale"], eps) if is_gemma2 else y)
        y = rms_norm(x, part["pre_mlp_norm/scale"], eps)
        y = gelu_tanh(y @ part["mlp/gate/kernel"].T) * (y @ part["mlp/up/kernel"].T)
        y = y @ part["mlp/down/kernel"].T
        x = x + (rms_norm(y, part["post_mlp_norm/scale"], eps) if is_gemma2 else y)
    x = rms_norm(x, p["decoder/norm/scale"], eps)
    return cap(x @ p["decoder/embedder/table"].T, config.final_logit_softcapping)


def at(p: dict, prefix: str) -> dict:
    return {path.removeprefix(prefix): a for path, a in p.items() if path.startswith(prefix)}


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + scale)


def layer_norm(x, part, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * part["scale"] + part["bias"]


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[:, None] / theta ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def cap(x, limit):
    return x if limit is None else np.tanh(x / limit) * limit
