"""The weight names and layouts of every format, as tables.

Axis letters are those of `paligemma_jax/model/layers.py`; C is the color channel, h and w are the
pixels of a patch. Hugging Face names are those of the released checkpoints, which every release of
transformers reads.
"""

from __future__ import annotations

from typing import NamedTuple

# The embedding table and the output head: their released names, and their paths here.
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TABLE_PATH, HEAD_PATH = "decoder/embedder/table", "decoder/head/table"


class WeightRow(NamedTuple):
    """One parameter in a file and in the model. In `key` and `path`, * is the number of the layer.

    A key that ends in [*] or [*,1] is that slice of a tensor that stacks layers (and fuses two
    parameters).
    """

    key: str
    file_layout: str
    path: str
    model_layout: str


def _rows(key: str, path: str, *rows: tuple[str, str, str, str]) -> list[WeightRow]:
    """Rows whose keys and paths start with these prefixes."""
    return [WeightRow(key + row[0], row[1], path + row[2], row[3]) for row in rows]


_HUGGINGFACE = [
    *_rows(
        "vision_tower.vision_model.embeddings.",
        "vision/",
        ("patch_embedding.weight", "W C h w", "patch/kernel", "W hwC"),
        ("patch_embedding.bias", "W", "patch/bias", "W"),
        ("position_embedding.weight", "P W", "position", "P W"),
    ),
    *_rows(
        "vision_tower.vision_model.encoder.layers.*.",
        "vision/layers/*/",
        ("layer_norm1.weight", "W", "pre_attention_norm/scale", "W"),
        ("layer_norm1.bias", "W", "pre_attention_norm/bias", "W"),
        ("self_attn.q_proj.weight", "NH W", "attention/q/kernel", "N H W"),
        ("self_attn.q_proj.bias", "NH", "attention/q/bias", "N H"),
        ("self_attn.k_proj.weight", "NH W", "attention/k/kernel", "N H W"),
        ("self_attn.k_proj.bias", "NH", "attention/k/bias", "N H"),
        ("self_attn.v_proj.weight", "NH W", "attention/v/kernel", "N H W"),
        ("self_attn.v_proj.bias", "NH", "attention/v/bias", "N H"),
        ("self_attn.out_proj.weight", "W NH", "attention/o/kernel", "W N H"),
        ("self_attn.out_proj.bias", "W", "attention/o/bias", "W"),
        ("layer_norm2.weight", "W", "pre_mlp_norm/scale", "W"),
        ("layer_norm2.bias", "W", "pre_mlp_norm/bias", "W"),
        ("mlp.fc1.weight", "F W", "mlp/up/kernel", "F W"),
        ("mlp.fc1.bias", "F", "mlp/up/bias", "F"),
        ("mlp.fc2.weight", "W F", "mlp/down/kernel", "W F"),
        ("mlp.fc2.bias", "W", "mlp/down/bias", "W"),
    ),
    WeightRow("vision_tower.vision_model.post_layernorm.weight", "W", "vision/norm/scale", "W"),
    WeightRow("vision_tower.vision_model.post_layernorm.bias", "W", "vision/norm/bias", "W"),
    WeightRow("multi_modal_projector.linear.weight", "D W", "projector/kernel", "D W"),
    WeightRow("multi_modal_projector.linear.bias", "D", "projector/bias", "D"),
    WeightRow(TABLE, "V D", TABLE_PATH, "V D"),
    WeightRow(HEAD, "V D", HEAD_PATH, "V D"),
    *_rows(
        "language_model.model.layers.*.",
        "decoder/layers/*/",
        ("input_layernorm.weight", "D", "pre_attention_norm/scale", "D"),
        ("self_attn.q_proj.weight", "NH D", "attention/q/kernel", "N H D"),
        ("self_attn.k_proj.weight", "KH D", "attention/k/kernel", "K H D"),
        ("self_attn.v_proj.weight", "KH D", "attention/v/kernel", "K H D"),
        ("self_attn.o_proj.weight", "D NH", "attention/o/kernel", "D N H"),
        ("mlp.gate_proj.weight", "F D", "mlp/gate/kernel", "F D"),
        ("mlp.up_proj.weight", "F D", "mlp/up/kernel", "F D"),
        ("mlp.down_proj.weight", "D F", "mlp/down/kernel", "D F"),
    ),
    WeightRow("language_model.model.norm.weight", "D", "decoder/norm/scale", "D"),
]

# `post_attention_layernorm` is the norm before the MLP in Gemma 1, but the norm after attention in
# Gemma 2.
HUGGINGFACE = {
    "gemma": _HUGGINGFACE
    + _rows(
        "language_model.model.layers.*.",
        "decoder/layers/*/",
        ("post_attention_layernorm.weight", "D", "pre_mlp_norm/scale", "D"),
    ),
    "gemma2": _HUGGINGFACE
    + _rows(
        "language_model.model.layers.*.",
        "decoder/layers/*/",
        ("post_attention_layernorm.weight", "D", "post_attention_norm/scale", "D"),
        ("pre_feedforward_layernorm.weight", "D", "pre_mlp_norm/scale", "D"),
        ("post_feedforward_layernorm.weight", "D", "post_mlp_norm/scale", "D"),
    ),
}

# Redundant or unused: a head tied to the table, buffers that old releases saved, SigLIP's pooling
# head.
HUGGINGFACE_IGNORED = [
    r"language_model\.lm_head\.weight",
    r".*\.(position_ids|rotary_emb\.inv_freq)",
    r"vision_tower\.vision_model\.head\..*",
    r"(embedding_proj_layer|custom_text_proj)\..*",  # of a ColPali (`convert/colpali.py`)
]

# Names of other releases -> released names, in order (transformers `conversion_mapping.py`).
HUGGINGFACE_SPELLINGS = [
    (r"^vlm\.", ""),  # the PaliGemma in a ColPali
    # colpali-engine puts one more "model." before the names of any release.
    (r"^(model\.)+(?=language_model\.|vision_tower\.|multi_modal_projector\.|lm_head\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]

# google-research/big_vision models/vit.py, models/ppp/gemma.py (`scan=True`: layers are stacked).
_BIG_VISION = [
    WeightRow("img/embedding/kernel", "h w C W", "vision/patch/kernel", "W hwC"),
    WeightRow("img/embedding/bias", "W", "vision/patch/bias", "W"),
    WeightRow("img/pos_embedding", "1 P W", "vision/position", "P W"),
    *_rows(
        "img/Transformer/encoderblock/",
        "vision/layers/*/",
        ("LayerNorm_0/scale[*]", "W", "pre_attention_norm/scale", "W"),
        ("LayerNorm_0/bias[*]", "W", "pre_attention_norm/bias", "W"),
    ),
    *_rows(
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/",
        "vision/layers/*/attention/",
        ("query/kernel[*]", "W N H", "q/kernel", "N H W"),
        ("query/bias[*]", "N H", "q/bias", "N H"),
        ("key/kernel[*]", "W N H", "k/kernel", "N H W"),
        ("key/bias[*]", "N H", "k/bias", "N H"),
        ("value/kernel[*]", "W N H", "v/kernel", "N H W"),
        ("value/bias[*]", "N H", "v/bias", "N H"),
        ("out/kernel[*]", "N H W", "o/kernel", "W N H"),
        ("out/bias[*]", "W", "o/bias", "W"),
    ),
    *_rows(
        "img/Transformer/encoderblock/",
        "vision/layers/*/",
        ("LayerNorm_1/scale[*]", "W", "pre_mlp_norm/scale", "W"),
        ("LayerNorm_1/bias[*]", "W", "pre_mlp_norm/bias", "W"),
        ("MlpBlock_0/Dense_0/kernel[*]", "W F", "mlp/up/kernel", "F W"),
        ("MlpBlock_0/Dense_0/bias[*]", "F", "mlp/up/bias", "F"),
        ("MlpBlock_0/Dense_1/kernel[*]", "F W", "mlp/down/kernel", "W F"),
        ("MlpBlock_0/Dense_1/bias[*]", "W", "mlp/down/bias", "W"),
    ),
    WeightRow("img/Transformer/encoder_norm/scale", "W", "vision/norm/scale", "W"),
    WeightRow("img/Transformer/encoder_norm/bias", "W", "vision/norm/bias", "W"),
    WeightRow("img/head/kernel", "W D", "projector/kernel", "D W"),
    WeightRow("img/head/bias", "D", "projector/bias", "D"),
    WeightRow("llm/embedder/input_embedding", "V D", TABLE_PATH, "V D"),
    *_rows(
        "llm/layers/",
        "decoder/layers/*/",
        ("pre_attention_norm/scale[*]", "D", "pre_attention_norm/scale", "D"),
        ("attn/q_einsum/w[*]", "N D H", "attention/q/kernel", "N H D"),
        ("attn/kv_einsum/w[*,0]", "K D H", "attention/k/kernel", "K H D"),
        ("attn/kv_einsum/w[*,1]", "K D H", "attention/v/kernel", "K H D"),
        ("attn/attn_vec_einsum/w[*]", "N H D", "attention/o/kernel", "D N H"),
        ("pre_ffw_norm/scale[*]", "D", "pre_mlp_norm/scale", "D"),
        ("mlp/gating_einsum[*,0]", "D F", "mlp/gate/kernel", "F D"),
        ("mlp/gating_einsum[*,1]", "D F", "mlp/up/kernel", "F D"),
        ("mlp/linear[*]", "F D", "mlp/down/kernel", "D F"),
    ),
    WeightRow("llm/final_norm/scale", "D", "decoder/norm/scale", "D"),
]
BIG_VISION = {
    "gemma": _BIG_VISION,
    "gemma2": _BIG_VISION
    + _rows(
        "llm/layers/",
        "decoder/layers/*/",
        ("post_attention_norm/scale[*]", "D", "post_attention_norm/scale", "D"),
        ("post_ffw_norm/scale[*]", "D", "post_mlp_norm/scale", "D"),
    ),
}

# In place of q_einsum and kv_einsum in models with as many key heads as query heads. No published
# PaliGemma has them.
BIG_VISION_QKV = _rows(
    "llm/layers/attn/",
    "decoder/layers/*/attention/",
    ("qkv_einsum/w[*,0]", "N D H", "q/kernel", "N H D"),
    ("qkv_einsum/w[*,1]", "K D H", "k/kernel", "K H D"),
    ("qkv_einsum/w[*,2]", "K D H", "v/kernel", "K H D"),
)

# Optimizer state and counters that a training run saves beside the parameters.
BIG_VISION_IGNORED = [r"(opt|chrono)(/.*)?"]

# This project's own checkpoints have the paths and layouts of the model.
JAX = {
    kind: [WeightRow(row.path, row.model_layout, row.path, row.model_layout) for row in rows]
    for kind, rows in HUGGINGFACE.items()
}
