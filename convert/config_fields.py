"""The fields of config.json and generation_config.json.

Every field of transformers 5.23's `PaliGemmaConfig`, `GemmaConfig`, `Gemma2Config` and
`SiglipVisionConfig` is either in a struct, with the default of its class; or in `SUPPORTED`, where
the model has no switch for it; or without effect on the output of transformers (`vocab_size` and
`hidden_size` at the top, `num_image_tokens`, `vision_use_head`, dropout, initialization).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from convert.typed_json import JsonObject, Positive, TokenId, check, describe
from paligemma_jax.model.config import NUMERICS

Depth = Annotated[int, Meta(ge=1, lt=1000)]
Number = Annotated[float, Meta(gt=0, lt=2**31)]
TokenIds = TokenId | list[TokenId] | None


class Vision(Struct):
    """vision_config (`SiglipVisionConfig`)."""

    hidden_size: Positive = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    patch_size: Positive = 16
    image_size: Positive = 224
    layer_norm_eps: Number = 1e-6


class Rope(Struct):
    """rope_parameters of transformers 5, and rope_scaling of 4."""

    rope_theta: Number | None = None


class Gemma(Struct):
    """text_config of PaliGemma 1 (`GemmaConfig`)."""

    hidden_size: Positive = 3072
    num_hidden_layers: Depth = 28
    num_attention_heads: Positive = 16
    num_key_value_heads: Positive = 16
    head_dim: Positive = 256
    intermediate_size: Positive = 24576
    vocab_size: Positive = 256000
    final_logit_softcapping: Number | None = None
    rms_norm_eps: Number = 1e-6
    rope_theta: Number = 10000.0
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    eos_token_id: TokenIds = None


class Gemma2(Gemma):
    """text_config of PaliGemma 2 (`Gemma2Config`)."""

    hidden_size: Positive = 2304
    num_hidden_layers: Depth = 26
    num_attention_heads: Positive = 8
    num_key_value_heads: Positive = 4
    intermediate_size: Positive = 9216
    query_pre_attn_scalar: Positive = 256
    sliding_window: Positive | None = 4096
    layer_types: list[str] | None = None
    attn_logit_softcapping: Number | None = 50.0
    final_logit_softcapping: Number | None = 30.0


class Quantization(Struct):
    """quantization_config. Old releases of transformers left out the method of bitsandbytes."""

    quant_method: str = ""
    load_in_8bit: bool = False
    load_in_4bit: bool = False


class Quantized(Struct):
    """The part of config.json that tells whether the weights are quantized."""

    quantization_config: Quantization | None = None
    quantization: JsonObject | None = None  # MLX


class Generation(Struct):
    """generation_config.json."""

    eos_token_id: TokenIds = None


class TextType(Struct):
    model_type: str = "gemma"


class ModelType(Struct):
    """The part of config.json that tells which of the following describes it."""

    model_type: str | None = None
    text_config: TextType | None = None


class PaliGemma(Struct):
    """config.json of PaliGemma 1 (`PaliGemmaConfig`)."""

    vision_config: Vision
    text_config: Gemma
    image_token_index: TokenId | None = None
    image_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    eos_token_id: TokenIds = None
    projection_dim: Positive | None = None
    tie_word_embeddings: bool = True  # that of text_config has no effect
    numerics: str = "transformers"  # ours: see config_to_json


class PaliGemma2(PaliGemma):
    """config.json of PaliGemma 2."""

    text_config: Gemma2  # type: ignore[assignment]


_ROPE = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "sliding_attention": (None,),
    "full_attention": (None,),
}
# The values that the model supports, by section: any other would give wrong results.
SUPPORTED: dict[str, dict[str, tuple[object, ...]]] = {
    "": {
        "numerics": tuple(NUMERICS),
        "transformers_weights": ("model.safetensors", None),
        "per_layer_config": ({}, None),
    },
    "vision_config": {
        "model_type": ("siglip_vision_model",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "num_channels": (3,),
        "per_layer_config": ({}, None),
    },
    "text_config": {
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "use_bidirectional_attention": (True, None),
        "per_layer_config": ({}, None),
    },
    "text_config.rope_parameters": _ROPE,
    "text_config.rope_scaling": _ROPE,
}


def check_supported(json: JsonObject) -> None:
    """Raise ValueError if a field of a config.json has a value that the model does not support."""
    for section, fields in SUPPORTED.items():
        values = json
        for key in section.split(".") if section else ():
            values = values.get(key) or {}
        for key, choices in fields.items():
            if key in values and values[key] not in choices:
                name = f"{section}.{key}".lstrip(".")
                known = ", ".join(map(describe, choices))
                got = describe(values[key])
                raise ValueError(f"config.json: {name} must be {known}, got {got}")


def check_quantization(json: JsonObject) -> None:
    """Raise ValueError if the weights are quantized in a way that cannot be read."""
    quantized = check(json, Quantized, "config.json")
    config = quantized.quantization_config
    if quantized.quantization:
        raise ValueError(f"config.json: the checkpoint {unsupported('MLX')}")
    if config and config.quant_method != "bitsandbytes":
        is_old = not config.quant_method and (config.load_in_8bit or config.load_in_4bit)
        if not is_old:
            method = unsupported(repr(config.quant_method))
            raise ValueError(f"config.json: the checkpoint {method}")


def unsupported(program: str) -> str:
    """The error of weights that a program quantized, for the end of a sentence."""
    return (
        f"is quantized by {program}, which cannot be read; use the unquantized checkpoint (and "
        "quantize it here, to int8, int4 or nf4), or one that bitsandbytes quantized"
    )
