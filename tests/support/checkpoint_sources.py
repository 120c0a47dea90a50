"""Checkpoints for the conversion tests, and a big_vision .npz that is built by hand from
big_vision's key list, without the table under test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file
from support import hf_models

from paligemma_jax.cli import main

SMALL = {"vision": {"num_hidden_layers": 2}, "text": {"num_hidden_layers": 3}}


def huggingface(
    directory: Path, kind: str = "pg2", layout: str = "released", dtype=torch.float32, **options
) -> Path:
    """Save a small random model of transformers."""
    model = hf_models.random_model(kind, **SMALL)
    return hf_models.save_checkpoint(model, directory, layout, dtype, **options)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by key, read by the safetensors library."""
    files = sorted(directory.glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def arrays(checkpoint) -> dict[str, np.ndarray]:
    """All tensors of a `convert.Checkpoint` by parameter path."""
    return {path: tensor.numpy() for path, tensor in checkpoint.tensors.items()}


def logits(model, inputs) -> np.ndarray:
    """Our teacher-forced logits [B, T, V]."""
    call = jax.jit(lambda model, *arrays: model(*arrays))
    return np.asarray(call(model, inputs.tokens, inputs.images, inputs.valid, inputs.prefix))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `paligemma-jax convert`, in this process."""
    capsys.readouterr()
    try:
        main(["convert", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0, *capsys.readouterr()
    return 0, *capsys.readouterr()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays have the same keys, dtypes, shapes and bits."""

    def bits(array: np.ndarray) -> tuple:
        return array.dtype, array.shape, array.tobytes()

    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def big_vision(
    directory: Path,
    file: Path,
    dtype: str = "float32",
    prefix: str = "params/",
    compressed: bool = False,
    **extra,
) -> Path:
    """Save the weights of a Hugging Face directory in released layout as big_vision does."""
    weights = tensors(directory)
    stacks = {**_vision(weights), **_text(weights)}
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    members = {
        prefix + key: np.ascontiguousarray(value).astype(numpy_dtype)
        for key, value in stacks.items()
    }
    if dtype == "bfloat16":
        members = {key: value.view("V2") for key, value in members.items()}
    members |= {prefix.replace("params", "opt") + key: value for key, value in extra.items()}
    (np.savez_compressed if compressed else np.savez)(file, **members)
    return file


def _vision(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    width, heads = hf_models.VISION["hidden_size"], hf_models.VISION["num_attention_heads"]
    size = width // heads
    encoder = "img/Transformer/encoderblock/"

    def tensor(name: str) -> np.ndarray:
        return weights[f"vision_tower.vision_model.{name}"]

    def stack(name: str, change: Callable = np.copy) -> np.ndarray:
        return np.stack([change(tensor(f"encoder.layers.{i}.{name}")) for i in range(2)])

    result = {
        "img/embedding/kernel": tensor("embeddings.patch_embedding.weight").transpose(2, 3, 1, 0),
        "img/embedding/bias": tensor("embeddings.patch_embedding.bias"),
        "img/pos_embedding": tensor("embeddings.position_embedding.weight")[None],
        "img/Transformer/encoder_norm/scale": tensor("post_layernorm.weight"),
        "img/Transformer/encoder_norm/bias": tensor("post_layernorm.bias"),
        "img/head/kernel": weights["multi_modal_projector.linear.weight"].T,
        "img/head/bias": weights["multi_modal_projector.linear.bias"],
    }
    for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        result[f"{encoder}{ours}/scale"] = stack(f"{theirs}.weight")
        result[f"{encoder}{ours}/bias"] = stack(f"{theirs}.bias")
    for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        result[f"{encoder}MlpBlock_0/{ours}/kernel"] = stack(f"mlp.{theirs}.weight", np.transpose)
        result[f"{encoder}MlpBlock_0/{ours}/bias"] = stack(f"mlp.{theirs}.bias")
    attention = encoder + "MultiHeadDotProductAttention_0/"
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel = stack(f"self_attn.{theirs}.weight", lambda x: x.T.reshape(width, heads, size))
        bias = stack(f"self_attn.{theirs}.bias", lambda x: x.reshape(heads, size))
        result[f"{attention}{ours}/kernel"], result[f"{attention}{ours}/bias"] = kernel, bias
    out = stack("self_attn.out_proj.weight", lambda x: x.T.reshape(heads, size, width))
    result[f"{attention}out/kernel"] = out
    result[f"{attention}out/bias"] = stack("self_attn.out_proj.bias")
    return result


def _text(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    config = hf_models.TEXT["pg2"]
    width, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]

    def tensor(name: str) -> np.ndarray:
        return weights[f"language_model.model.{name}"]

    def stack(name: str, change: Callable = np.copy) -> np.ndarray:
        return np.stack([change(tensor(f"layers.{i}.{name}.weight")) for i in range(3)])

    def per_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, size, width).transpose(0, 2, 1)  # [NH, D] -> [N, D, H]

    key_value = [stack(f"self_attn.{name}_proj", per_head) for name in "kv"]
    gate_up = [stack(f"mlp.{name}_proj", np.transpose) for name in ("gate", "up")]
    layers = {
        "attn/q_einsum/w": stack("self_attn.q_proj", per_head),
        "attn/kv_einsum/w": np.stack(key_value, axis=1),
        "attn/attn_vec_einsum/w": stack(
            "self_attn.o_proj", lambda x: x.T.reshape(heads, size, width)
        ),
        "mlp/gating_einsum": np.stack(gate_up, axis=1),
        "mlp/linear": stack("mlp.down_proj", np.transpose),
        "pre_attention_norm/scale": stack("input_layernorm"),
    }
    if "language_model.model.layers.0.pre_feedforward_layernorm.weight" in weights:
        layers["post_attention_norm/scale"] = stack("post_attention_layernorm")
        layers["pre_ffw_norm/scale"] = stack("pre_feedforward_layernorm")
        layers["post_ffw_norm/scale"] = stack("post_feedforward_layernorm")
    else:
        layers["pre_ffw_norm/scale"] = stack("post_attention_layernorm")
    return {
        "llm/embedder/input_embedding": tensor("embed_tokens.weight")[: hf_models.IMAGE],
        "llm/final_norm/scale": tensor("norm.weight"),
        **{f"llm/layers/{name}": value for name, value in layers.items()},
    }
