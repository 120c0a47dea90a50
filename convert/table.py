"""The weight names and layouts of every format. Rows, no code: (name in the file, its layout, path here, layout here); * is the layer."""

from __future__ import annotations

# Axis letters: paligemma_jax/model/layers.py; C colour, h and w the pixels of a patch. Letters written together are one merged axis.
# The names are those of the released checkpoints, which every transformers release reads.

_VISION = "vision_tower.vision_model."
_TEXT = "language_model.model."

_HUGGINGFACE_VISION = [
    (_VISION + "embeddings.patch_embedding.weight", "W C h w", "vision/patch/kernel", "hwC W"),
    (_VISION + "embeddings.patch_embedding.bias", "W", "vision/patch/bias", "W"),
    (_VISION + "embeddings.position_embedding.weight", "P W", "vision/position", "P W"),
    (_VISION + "encoder.layers.*.layer_norm1.weight", "W", "vision/layers/*/pre_attention_norm/scale", "W"),
    (_VISION + "encoder.layers.*.layer_norm1.bias", "W", "vision/layers/*/pre_attention_norm/bias", "W"),
    (_VISION + "encoder.layers.*.self_attn.q_proj.weight", "NH W", "vision/layers/*/attention/q/kernel", "W N H"),
    (_VISION + "encoder.layers.*.self_attn.q_proj.bias", "NH", "vision/layers/*/attention/q/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.k_proj.weight", "NH W", "vision/layers/*/attention/k/kernel", "W N H"),
    (_VISION + "encoder.layers.*.self_attn.k_proj.bias", "NH", "vision/layers/*/attention/k/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.v_proj.weight", "NH W", "vision/layers/*/attention/v/kernel", "W N H"),
    (_VISION + "encoder.layers.*.self_attn.v_proj.bias", "NH", "vision/layers/*/attention/v/bias", "N H"),
    (_VISION + "encoder.layers.*.self_attn.out_proj.weight", "W NH", "vision/layers/*/attention/o/kernel", "N H W"),
    (_VISION + "encoder.layers.*.self_attn.out_proj.bias", "W", "vision/layers/*/attention/o/bias", "W"),
    (_VISION + "encoder.layers.*.layer_norm2.weight", "W", "vision/layers/*/pre_mlp_norm/scale", "W"),
    (_VISION + "encoder.layers.*.layer_norm2.bias", "W", "vision/layers/*/pre_mlp_norm/bias", "W"),
    (_VISION + "encoder.layers.*.mlp.fc1.weight", "F W", "vision/layers/*/mlp/up/kernel", "W F"),
    (_VISION + "encoder.layers.*.mlp.fc1.bias", "F", "vision/layers/*/mlp/up/bias", "F"),
    (_VISION + "encoder.layers.*.mlp.fc2.weight", "W F", "vision/layers/*/mlp/down/kernel", "F W"),
    (_VISION + "encoder.layers.*.mlp.fc2.bias", "W", "vision/layers/*/mlp/down/bias", "W"),
    (_VISION + "post_layernorm.weight", "W", "vision/norm/scale", "W"),
    (_VISION + "post_layernorm.bias", "W", "vision/norm/bias", "W"),
    ("multi_modal_projector.linear.weight", "D W", "projector/kernel", "W D"),
    ("multi_modal_projector.linear.bias", "D", "projector/bias", "D"),
]

_HUGGINGFACE_TEXT = [
    (_TEXT + "embed_tokens.weight", "V D", "decoder/embedder/table", "V D"),
    (_TEXT + "layers.*.input_layernorm.weight", "D", "decoder/layers/*/pre_attention_norm/scale", "D"),
    (_TEXT + "layers.*.self_attn.q_proj.weight", "NH D", "decoder/layers/*/attention/q/kernel", "D N H"),
    (_TEXT + "layers.*.self_attn.k_proj.weight", "KH D", "decoder/layers/*/attention/k/kernel", "D K H"),
    (_TEXT + "layers.*.self_attn.v_proj.weight", "KH D", "decoder/layers/*/attention/v/kernel", "D K H"),
    (_TEXT + "layers.*.self_attn.o_proj.weight", "D NH", "decoder/layers/*/attention/o/kernel", "N H D"),
    (_TEXT + "layers.*.mlp.gate_proj.weight", "F D", "decoder/layers/*/mlp/gate/kernel", "D F"),
    (_TEXT + "layers.*.mlp.up_proj.weight", "F D", "decoder/layers/*/mlp/up/kernel", "D F"),
    (_TEXT + "layers.*.mlp.down_proj.weight", "D F", "decoder/layers/*/mlp/down/kernel", "F D"),
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
