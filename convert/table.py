"""The weight names and layouts of every format. Rows, no code: (name in the file, its layout, path here, layout here); * is the layer.

A name that ends in [*], or [*,1], is that part of a tensor which stacks the layers (and fuses two parameters).
"""

from __future__ import annotations

WeightRow = tuple[str, str, str, str]

# Axis letters: paligemma_jax/model/layers.py; C colour, h and w the pixels of a patch. Letters written together are one merged axis.
# The names are those of the released checkpoints, which every transformers release reads.

_VISION = "vision_tower.vision_model."
_TEXT = "language_model.model."

_HUGGINGFACE_VISION = [
    (_VISION + "embeddings.patch_embedding.weight", "W C h w", "vision/patch/kernel", "W hwC"),
    (_VISION + "embeddings.patch_embedding.bias", "W", "vision/patch/bias", "W"),
    (_VISION + "embeddings.position_embedding.weight", "P W", "vision/position", "P W"),
    (_VISION + "encoder.layers.*.layer_norm1.weight", "W", "vision/layers/*/pre_attention_norm/scale", "W"),
    (_VISION + "encoder.layers.*.layer_norm1.bias", "W", "vision/layers/*/pre_attention_norm/bias", "W"),
    (_VISION + "encoder.layers.*.self_attn.q_proj.weight", "NH W", "vision/layers/*/attention/q/kernel", "N H W"),
    (_VISION + "encoder.layers.*.self_attn.q_proj.bias", "NH", "vision/layers/*/attention/q/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.k_proj.weight", "NH W", "vision/layers/*/attention/k/kernel", "N H W"),
    (_VISION + "encoder.layers.*.self_attn.k_proj.bias", "NH", "vision/layers/*/attention/k/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.v_proj.weight", "NH W", "vision/layers/*/attention/v/kernel", "N H W"),
    (_VISION + "encoder.layers.*.self_attn.v_proj.bias", "NH", "vision/layers/*/attention/v/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.out_proj.weight", "W NH", "vision/layers/*/attention/o/kernel", "W N H"),
    (_VISION + "encoder.layers.*.self_attn.out_proj.bias", "W", "vision/layers/*/attention/o/bias", "W"),
    (_VISION + "encoder.layers.*.layer_norm2.weight", "W", "vision/layers/*/pre_mlp_norm/scale", "W"),
    (_VISION + "encoder.layers.*.layer_norm2.bias", "W", "vision/layers/*/pre_mlp_norm/bias", "W"),
    (_VISION + "encoder.layers.*.mlp.fc1.weight", "F W", "vision/layers/*/mlp/up/kernel", "F W"),
    (_VISION + "encoder.layers.*.mlp.fc1.bias", "F", "vision/layers/*/mlp/up/bias", "F"),
    (_VISION + "encoder.layers.*.mlp.fc2.weight", "W F", "vision/layers/*/mlp/down/kernel", "W F"),
    (_VISION + "encoder.layers.*.mlp.fc2.bias", "W", "vision/layers/*/mlp/down/bias", "W"),
    (_VISION + "post_layernorm.weight", "W", "vision/norm/scale", "W"),
    (_VISION + "post_layernorm.bias", "W", "vision/norm/bias", "W"),
    ("multi_modal_projector.linear.weight", "D W", "projector/kernel", "D W"),
    ("multi_modal_projector.linear.bias", "D", "projector/bias", "D"),
]

_HUGGINGFACE_TEXT = [
    (_TEXT + "embed_tokens.weight", "V D", "decoder/embedder/table", "V D"),
    (_TEXT + "layers.*.input_layernorm.weight", "D", "decoder/layers/*/pre_attention_norm/scale", "D"),
    (_TEXT + "layers.*.self_attn.q_proj.weight", "NH D", "decoder/layers/*/attention/q/kernel", "N H D"),
    (_TEXT + "layers.*.self_attn.k_proj.weight", "KH D", "decoder/layers/*/attention/k/kernel", "K H D"),
    (_TEXT + "layers.*.self_attn.v_proj.weight", "KH D", "decoder/layers/*/attention/v/kernel", "K H D"),
    (_TEXT + "layers.*.self_attn.o_proj.weight", "D NH", "decoder/layers/*/attention/o/kernel", "D N H"),
    (_TEXT + "layers.*.mlp.gate_proj.weight", "F D", "decoder/layers/*/mlp/gate/kernel", "F D"),
    (_TEXT + "layers.*.mlp.up_proj.weight", "F D", "decoder/layers/*/mlp/up/kernel", "F D"),
    (_TEXT + "layers.*.mlp.down_proj.weight", "D F", "decoder/layers/*/mlp/down/kernel", "D F"),
    (_TEXT + "norm.weight", "D", "decoder/norm/scale", "D"),
]

# The trap: `post_attention_layernorm` is the norm before the MLP in Gemma 1 and the norm after attention in Gemma 2.
_HUGGINGFACE_NORMS = {
    "gemma": [
        (_TEXT + "layers.*.post_attention_layernorm.weight", "D", "decoder/layers/*/pre_mlp_norm/scale", "D"),
    ],
    "gemma2": [
        (_TEXT + "layers.*.post_attention_layernorm.weight", "D", "decoder/layers/*/post_attention_norm/scale", "D"),
        (_TEXT + "layers.*.pre_feedforward_layernorm.weight", "D", "decoder/layers/*/pre_mlp_norm/scale", "D"),
        (_TEXT + "layers.*.post_feedforward_layernorm.weight", "D", "decoder/layers/*/post_mlp_norm/scale", "D"),
    ],
}

HUGGINGFACE = {kind: _HUGGINGFACE_VISION + _HUGGINGFACE_TEXT + norms for kind, norms in _HUGGINGFACE_NORMS.items()}

# Keys that hold nothing of their own: the tied head, buffers that old releases saved, SigLIP's unused pooling head.
HUGGINGFACE_IGNORED = [
    r"language_model\.lm_head\.weight",
    r".*\.(position_ids|rotary_emb\.inv_freq)",
    r"vision_tower\.vision_model\.head\..*",
]

# Spellings of other releases -> the released one, applied in this order (transformers `conversion_mapping.py`).
HUGGINGFACE_SPELLINGS = [
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]

_BLOCK, _LAYERS = "img/Transformer/encoderblock/", "llm/layers/"

_BIG_VISION = [
    ("img/embedding/kernel", "h w C W", "vision/patch/kernel", "W hwC"),
    ("img/embedding/bias", "W", "vision/patch/bias", "W"),
    ("img/pos_embedding", "1 P W", "vision/position", "P W"),
    (_BLOCK + "LayerNorm_0/scale[*]", "W", "vision/layers/*/pre_attention_norm/scale", "W"),
    (_BLOCK + "LayerNorm_0/bias[*]", "W", "vision/layers/*/pre_attention_norm/bias", "W"),
    (_BLOCK + "MultiHeadDotProductAttention_0/query/kernel[*]", "W N H", "vision/layers/*/attention/q/kernel", "N H W"),
    (_BLOCK + "MultiHeadDotProductAttention_0/query/bias[*]", "N H", "vision/layers/*/attention/q/bias", "N H"),
    (_BLOCK + "MultiHeadDotProductAttention_0/key/kernel[*]", "W N H", "vision/layers/*/attention/k/kernel", "N H W"),
    (_BLOCK + "MultiHeadDotProductAttention_0/key/bias[*]", "N H", "vision/layers/*/attention/k/bias", "N H"),
    (_BLOCK + "MultiHeadDotProductAttention_0/value/kernel[*]", "W N H", "vision/layers/*/attention/v/kernel", "N H W"),
    (_BLOCK + "MultiHeadDotProductAttention_0/value/bias[*]", "N H", "vision/layers/*/attention/v/bias", "N H"),
    (_BLOCK + "MultiHeadDotProductAttention_0/out/kernel[*]", "N H W", "vision/layers/*/attention/o/kernel", "W N H"),
    (_BLOCK + "MultiHeadDotProductAttention_0/out/bias[*]", "W", "vision/layers/*/attention/o/bias", "W"),
    (_BLOCK + "LayerNorm_1/scale[*]", "W", "vision/layers/*/pre_mlp_norm/scale", "W"),
    (_BLOCK + "LayerNorm_1/bias[*]", "W", "vision/layers/*/pre_mlp_norm/bias", "W"),
    (_BLOCK + "MlpBlock_0/Dense_0/kernel[*]", "W F", "vision/layers/*/mlp/up/kernel", "F W"),
    (_BLOCK + "MlpBlock_0/Dense_0/bias[*]", "F", "vision/layers/*/mlp/up/bias", "F"),
    (_BLOCK + "MlpBlock_0/Dense_1/kernel[*]", "F W", "vision/layers/*/mlp/down/kernel", "W F"),
    (_BLOCK + "MlpBlock_0/Dense_1/bias[*]", "W", "vision/layers/*/mlp/down/bias", "W"),
    ("img/Transformer/encoder_norm/scale", "W", "vision/norm/scale", "W"),
    ("img/Transformer/encoder_norm/bias", "W", "vision/norm/bias", "W"),
    ("img/head/kernel", "W D", "projector/kernel", "D W"),
    ("img/head/bias", "D", "projector/bias", "D"),
    ("llm/embedder/input_embedding", "V D", "decoder/embedder/table", "V D"),
    (_LAYERS + "pre_attention_norm/scale[*]", "D", "decoder/layers/*/pre_attention_norm/scale", "D"),
    (_LAYERS + "attn/q_einsum/w[*]", "N D H", "decoder/layers/*/attention/q/kernel", "N H D"),
    (_LAYERS + "attn/kv_einsum/w[*,0]", "K D H", "decoder/layers/*/attention/k/kernel", "K H D"),
    (_LAYERS + "attn/kv_einsum/w[*,1]", "K D H", "decoder/layers/*/attention/v/kernel", "K H D"),
    (_LAYERS + "attn/attn_vec_einsum/w[*]", "N H D", "decoder/layers/*/attention/o/kernel", "D N H"),
    (_LAYERS + "pre_ffw_norm/scale[*]", "D", "decoder/layers/*/pre_mlp_norm/scale", "D"),
    (_LAYERS + "mlp/gating_einsum[*,0]", "D F", "decoder/layers/*/mlp/gate/kernel", "F D"),
    (_LAYERS + "mlp/gating_einsum[*,1]", "D F", "decoder/layers/*/mlp/up/kernel", "F D"),
    (_LAYERS + "mlp/linear[*]", "F D", "decoder/layers/*/mlp/down/kernel", "D F"),
    ("llm/final_norm/scale", "D", "decoder/norm/scale", "D"),
]
_BIG_VISION_GEMMA2 = [
    (_LAYERS + "post_attention_norm/scale[*]", "D", "decoder/layers/*/post_attention_norm/scale", "D"),
    (_LAYERS + "post_ffw_norm/scale[*]", "D", "decoder/layers/*/post_mlp_norm/scale", "D"),
]

# google-research/big_vision models/vit.py, models/ppp/gemma.py (`scan=True`: one tensor for all layers).
BIG_VISION = {"gemma": _BIG_VISION, "gemma2": _BIG_VISION + _BIG_VISION_GEMMA2}

# Where there are as many key heads as query heads (no published PaliGemma), these take the place of q_einsum and kv_einsum.
BIG_VISION_QKV = [
    (_LAYERS + "attn/qkv_einsum/w[*,0]", "N D H", "decoder/layers/*/attention/q/kernel", "N H D"),
    (_LAYERS + "attn/qkv_einsum/w[*,1]", "K D H", "decoder/layers/*/attention/k/kernel", "K H D"),
    (_LAYERS + "attn/qkv_einsum/w[*,2]", "K D H", "decoder/layers/*/attention/v/kernel", "K H D"),
]

# What a training run saves beside the parameters: optimizer state and counters.
BIG_VISION_IGNORED = [r"(opt|chrono)(/.*)?"]

# This project's own checkpoints: the paths and layouts of the model itself.
JAX = {kind: [(path, layout, path, layout) for _, _, path, layout in rows] for kind, rows in HUGGINGFACE.items()}
