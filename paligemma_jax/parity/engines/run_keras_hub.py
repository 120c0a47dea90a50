"""Run any release of keras-hub on a job. Needs numpy, safetensors, jax, keras and keras-hub only,
so that it runs in an environment without this project.

    KERAS_BACKEND=jax python run_keras_hub.py JOB

A job is that of `run_transformers.py`. keras-hub has one call only. It knows no image tokens: it
places one image before each row's text, and pads at its end. Its table has rows for text only, so
that V is the id of the image token. Each row is decoded alone: beside a shorter row, keras-hub
gives a longer one other logits.

The result is outputs.npz: labels/logits float32[B, T, V], with targets as the response, and with
`new` tokens, those of `generate_step`: tokens int32[B, new], prefill float32[B, V] and decode
float32[B, new - 1, V].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras_hub  # pyright: ignore[reportMissingImports]
import numpy as np
from keras import ops  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file

BLOCK = {  # layers of the encoder: names here, names in the checkpoint
    "layer_norm_1": "layer_norm1",
    "layer_norm_2": "layer_norm2",
    "mlp_dense_1": "mlp.fc1",
    "mlp_dense_2": "mlp.fc2",
    "attn.query_proj": "self_attn.q_proj",
    "attn.key_proj": "self_attn.k_proj",
    "attn.value_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
}
MLP = {"gating_ffw": "gate_proj", "gating_ffw_2": "up_proj", "ffw_linear": "down_proj"}
NORMS = {  # Gemma 1, whose second norm is named otherwise, and Gemma 2
    False: {"pre_attention_norm": "input", "pre_ffw_norm": "post_attention"},
    True: {
        "pre_attention_norm": "input",
        "post_attention_norm": "post_attention",
        "pre_ffw_norm": "pre_feedforward",
        "post_ffw_norm": "post_feedforward",
    },
}


def load(checkpoint: Path, dtype: str) -> keras_hub.models.PaliGemmaCausalLM:
    """Build the model as the converter of the published presets does, and set all weights."""
    config = json.loads((checkpoint / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    second = text.get("model_type") == "gemma2"
    gemma2 = dict(
        query_head_dim_normalize=text.get("query_pre_attn_scalar") == text["head_dim"],
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        final_logit_soft_cap=text.get("final_logit_softcapping"),
        attention_logit_soft_cap=text.get("attn_logit_softcapping"),
        use_sliding_window_attention=True,
        sliding_window_size=text.get("sliding_window"),
    )
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=config["image_token_index"],
        image_size=vision["image_size"],
        num_layers=text["num_hidden_layers"],
        num_query_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        hidden_dim=text["hidden_size"],
        intermediate_dim=2 * text["intermediate_size"],
        head_dim=text["head_dim"],
        vit_patch_size=vision["patch_size"],
        vit_num_heads=vision["num_attention_heads"],
        vit_hidden_dim=vision["hidden_size"],
        vit_num_layers=vision["num_hidden_layers"],
        vit_intermediate_dim=vision["intermediate_size"],
        dtype=dtype,
        **(gemma2 if second else {}),
    )
    weights = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        weights |= load_file(file)
    pairs = [*vision_weights(backbone), *decoder_weights(backbone, second)]
    unused = weights.keys() - {name for _, name in pairs} - {"language_model.lm_head.weight"}
    unset = len(backbone.weights) - len(pairs)
    if unused or unset:
        names = ", ".join(sorted(unused)) or "none"
        raise SystemExit(f"{unset} variables are not set; unused weights: {names}")
    for variable, name in pairs:
        variable.assign(layout(weights[name], variable.shape, variable.name))
    return keras_hub.models.PaliGemmaCausalLM(preprocessor=None, backbone=backbone)


def vision_weights(backbone):
    """Pairs of a variable and its name in the checkpoint, of encoder and projector."""
    encoder = backbone.vit_encoder.get_layer("image_encoder")
    root = "vision_tower.vision_model"
    embeddings = encoder.vision_embeddings
    patch = f"{root}.embeddings.patch_embedding"
    yield embeddings.patch_embedding.kernel, f"{patch}.weight"
    yield embeddings.patch_embedding.bias, f"{patch}.bias"
    position = f"{root}.embeddings.position_embedding.weight"
    yield embeddings.position_embedding.embeddings, position
    yield from both(encoder.encoder_layer_norm, f"{root}.post_layernorm")
    for index, block in enumerate(encoder.resblocks):
        for ours, theirs in BLOCK.items():
            layer = block
            for part in ours.split("."):
                layer = getattr(layer, part)
            yield from both(layer, f"{root}.encoder.layers.{index}.{theirs}")
    projector = backbone.vit_encoder.get_layer("image_classifier")
    yield from both(projector, "multi_modal_projector.linear")


def decoder_weights(backbone, second: bool):
    """The same of the decoder."""
    root = "language_model.model"
    yield backbone.token_embedding.embeddings, f"{root}.embed_tokens.weight"
    yield backbone.layer_norm.scale, f"{root}.norm.weight"
    for index, layer in enumerate(backbone.transformer_layers):
        name = f"{root}.layers.{index}"
        for ours, theirs in NORMS[second].items():
            yield getattr(layer, ours).scale, f"{name}.{theirs}_layernorm.weight"
        for ours, theirs in MLP.items():
            yield getattr(layer, ours).kernel, f"{name}.mlp.{theirs}.weight"
        attention = layer.attention
        yield attention.query_dense.kernel, f"{name}.self_attn.q_proj.weight"
        yield attention.key_dense.kernel, f"{name}.self_attn.k_proj.weight"
        yield attention.value_dense.kernel, f"{name}.self_attn.v_proj.weight"
        yield attention.output_dense.kernel, f"{name}.self_attn.o_proj.weight"


def both(layer, name: str):
    scale = layer.gamma if hasattr(layer, "gamma") else layer.kernel
    bias = layer.beta if hasattr(layer, "gamma") else layer.bias
    return [(scale, f"{name}.weight"), (bias, f"{name}.bias")]


def layout(weight: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A weight of the checkpoint in the layout of a variable."""
    if name == "embeddings":  # the checkpoint has rows of no text, too
        return weight[: shape[0]]
    if weight.ndim == 4:  # [out, in, height, width]
        return weight.transpose(2, 3, 1, 0)
    if len(shape) == 2:
        return weight.T
    if len(shape) == 3 and weight.shape[0] == shape[0] * shape[2]:  # [N H, D] -> [N, D, H]
        return weight.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1)
    if len(shape) == 3:  # [D, N H] -> [N, H, D]
        return weight.reshape(shape[2], *shape[:2]).transpose(1, 2, 0)
    return weight


def text_only(inputs, prefix: str, count: int) -> dict[str, np.ndarray]:
    """keras-hub's inputs: text after the `count` tokens of the image, with pads at the end."""
    tokens, valid, targets = (
        inputs[f"{prefix}{name}"][:, count:] for name in ("tokens", "valid", "targets")
    )
    return {
        "images": inputs["images"],
        "token_ids": tokens,
        "padding_mask": valid.astype(np.int32),
        "response_mask": targets.astype(np.int32),
    }


def forward(model, batch) -> np.ndarray:
    """Teacher-forced logits of image and text. (The model itself returns those of the text.)"""
    hidden = model.backbone(batch)
    logits = model.backbone.token_embedding(hidden, reverse=True)
    count = model.backbone.image_sequence_length
    if not np.array_equal(as_numpy(model(batch)), as_numpy(logits)[:, count:]):
        raise SystemExit("the model's logits are not those of its backbone")
    return as_numpy(logits)


def generate(model, batch, new: int, eos: list[int]) -> dict[str, np.ndarray]:
    """Greedy tokens of `generate_step`, row by row."""
    rows = []
    for row in range(len(batch["token_ids"])):
        length = batch["padding_mask"][row].sum()
        cut = {name: value[row : row + 1] for name, value in batch.items()}
        cut |= {name: cut[name][:, :length] for name in ("token_ids", "padding_mask")}
        rows.append(generate_row(model, cut, new, eos))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def generate_row(model, batch, new: int, eos: list[int]) -> dict[str, np.ndarray]:
    """Greedy tokens of one row without pads, with a sampler that keeps the logits."""
    steps = []

    def sampler(*, next, prompt, cache, index, **_):
        for place in range(int(index), prompt.shape[1]):
            logits, _, cache = next(prompt, cache, place)
            steps.append(as_numpy(logits))
            allowed = steps[-1].copy()
            allowed[:, eos] = -np.inf
            token = ops.cast(allowed.argmax(axis=-1)[:, None], prompt.dtype)
            prompt = ops.slice_update(prompt, [0, place], token)
        return prompt

    model.sampler = sampler
    room = {k: np.pad(batch[k], ((0, 0), (0, new))) for k in ("token_ids", "padding_mask")}
    output = model.generate_step({**room, "images": batch["images"]})
    logits = np.stack(steps, axis=1)
    tokens = np.asarray(output["token_ids"])[:, -new:].astype(np.int32)
    return {"tokens": tokens, "prefill": logits[:, 0], "decode": logits[:, 1:]}


def as_numpy(tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    model = load(Path(job["checkpoint"]), job["dtype"])
    count = model.backbone.image_sequence_length
    outputs = {"labels/logits": forward(model, text_only(inputs, "", count))}
    if job["new"]:
        prompts = text_only(inputs, "prompt_", count)
        outputs |= generate(model, prompts, job["new"], job["eos"])
    np.savez(folder / "outputs.npz", **outputs)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
