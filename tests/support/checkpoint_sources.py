"""Checkpoints for the conversion tests, and a big_vision .npz built from the key list alone, without the table that it tests."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file
from support import hf_models

from convert.__main__ import main

SMALL = {"vision": {"num_hidden_layers": 2}, "text": {"num_hidden_layers": 3}}


def huggingface(directory: Path, kind: str = "pg2", layout: str = "released", dtype=torch.float32, **how) -> Path:
    return hf_models.save_checkpoint(hf_models.random_model(kind, **SMALL), directory, layout, dtype, **how)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by key, read by the safetensors library."""
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def logits(model, inputs) -> np.ndarray:
    """Our teacher-forced logits [B, T, V]."""
    call = jax.jit(lambda model, *arrays: model(*arrays))
    return np.asarray(call(model, inputs.tokens, inputs.images, inputs.valid, inputs.prefix))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m convert`, in this process."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0, *capsys.readouterr()
    return 0, *capsys.readouterr()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    bits = lambda x: (x.dtype, x.shape, x.tobytes())
    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def big_vision(directory: Path, file: Path, dtype: str = "float32", prefix: str = "params/", compressed: bool = False, **extra) -> Path:
    """The weights of a Hugging Face directory in released layout as big_vision saves them: numpy.savez, transposed by hand."""
    w, text, vision = tensors(directory), hf_models.TEXT["pg2"], hf_models.VISION
    N, H = text["num_attention_heads"], text["head_dim"]
    D, W, n = text["hidden_size"], vision["hidden_size"], vision["num_attention_heads"]
    img = lambda name: w[f"vision_tower.vision_model.{name}"]
    llm = lambda name: w[f"language_model.model.{name}"]
    towers = {"vision": 2, "text": 3}
    stack = lambda tower, f: np.stack([f(i) for i in range(towers[tower])])
    block = lambda name, f: stack("vision", lambda i: f(img(f"encoder.layers.{i}.{name}")))
    layer = lambda name, f=lambda x: x: stack("text", lambda i: f(llm(f"layers.{i}.{name}.weight")))
    per_head = lambda x: x.reshape(-1, H, D).transpose(0, 2, 1)  # (heads * H, D) -> (heads, D, H)
    found = {
        "img/embedding/kernel": img("embeddings.patch_embedding.weight").transpose(2, 3, 1, 0),
        "img/embedding/bias": img("embeddings.patch_embedding.bias"),
        "img/pos_embedding": img("embeddings.position_embedding.weight")[None],
        "img/Transformer/encoder_norm/scale": img("post_layernorm.weight"),
        "img/Transformer/encoder_norm/bias": img("post_layernorm.bias"),
        "img/head/kernel": w["multi_modal_projector.linear.weight"].T,
        "img/head/bias": w["multi_modal_projector.linear.bias"],
        "llm/embedder/input_embedding": llm("embed_tokens.weight")[: hf_models.IMAGE],
        "llm/final_norm/scale": llm("norm.weight"),
        "llm/layers/attn/q_einsum/w": layer("self_attn.q_proj", per_head),
        "llm/layers/attn/kv_einsum/w": np.stack([layer("self_attn.k_proj", per_head), layer("self_attn.v_proj", per_head)], axis=1),
        "llm/layers/attn/attn_vec_einsum/w": layer("self_attn.o_proj", lambda x: x.T.reshape(N, H, D)),
        "llm/layers/mlp/gating_einsum": np.stack([layer("mlp.gate_proj", np.transpose), layer("mlp.up_proj", np.transpose)], axis=1),
        "llm/layers/mlp/linear": layer("mlp.down_proj", np.transpose),
        "llm/layers/pre_attention_norm/scale": layer("input_layernorm"),
    }
    if "language_model.model.layers.0.pre_feedforward_layernorm.weight" in w:
        found["llm/layers/post_attention_norm/scale"] = layer("post_attention_layernorm")
        found["llm/layers/pre_ffw_norm/scale"] = layer("pre_feedforward_layernorm")
        found["llm/layers/post_ffw_norm/scale"] = layer("post_feedforward_layernorm")
    else:
        found["llm/layers/pre_ffw_norm/scale"] = layer("post_attention_layernorm")
    encoder = "img/Transformer/encoderblock/"
    for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        found[f"{encoder}{ours}/scale"], found[f"{encoder}{ours}/bias"] = block(f"{theirs}.weight", np.copy), block(f"{theirs}.bias", np.copy)
    for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        found[f"{encoder}MlpBlock_0/{ours}/kernel"] = block(f"mlp.{theirs}.weight", np.transpose)
        found[f"{encoder}MlpBlock_0/{ours}/bias"] = block(f"mlp.{theirs}.bias", np.copy)
    attention = encoder + "MultiHeadDotProductAttention_0/"
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        found[f"{attention}{ours}/kernel"] = block(f"self_attn.{theirs}.weight", lambda x: x.T.reshape(W, n, W // n))
        found[f"{attention}{ours}/bias"] = block(f"self_attn.{theirs}.bias", lambda x: x.reshape(n, W // n))
    found[f"{attention}out/kernel"] = block("self_attn.out_proj.weight", lambda x: x.T.reshape(n, W // n, W))
    found[f"{attention}out/bias"] = block("self_attn.out_proj.bias", np.copy)
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    cast = {prefix + key: np.ascontiguousarray(value).astype(kind) for key, value in found.items()}
    if dtype == "bfloat16":
        cast = {key: value.view("V2") for key, value in cast.items()}
    (np.savez_compressed if compressed else np.savez)(file, **cast, **{prefix.replace("params", "opt") + key: value for key, value in extra.items()})
    return file
