"""Hugging Face's config.json <-> `PaliGemmaConfig`, both generations (transformers 4 and 5)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from paligemma_jax.model.config import NUMERICS, DecoderConfig, PaliGemmaConfig, VisionConfig

# What a key absent from config.json means: the defaults of the class that the nested model_type names.
_VISION_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16, image_size=224, layer_norm_eps=1e-6
)
_TEXT_DEFAULTS = {
    "gemma": dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, head_dim=256, intermediate_size=24576,
        vocab_size=256000, rms_norm_eps=1e-6, rope_theta=10000.0,
    ),
    "gemma2": dict(
        hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256, intermediate_size=9216,
        vocab_size=256000, rms_norm_eps=1e-6, rope_theta=10000.0,
        query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
}  # fmt: skip
# Settings that the model here does not have a switch for: any other value would be silently wrong.
_VISION_FIXED = {"model_type": ("siglip_vision_model",), "hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)}
_TEXT_FIXED = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,),
    "use_bidirectional_attention": (True, None),
}  # fmt: skip


def read_config(json: dict[str, Any], generation: dict[str, Any] | None = None) -> PaliGemmaConfig:
    """The config that a config.json (and generation_config.json, for the ids that end an answer) describes; ValueError if it is another model's."""
    if json.get("model_type") != "paligemma":
        found = f"is that of a {json['model_type']!r} model" if "model_type" in json else "has no model_type"
        raise ValueError(f"config.json {found}; that of a PaliGemma checkpoint says model_type 'paligemma'")
    vision, text = _VISION_DEFAULTS | _given(json, "vision_config"), _given(json, "text_config")
    kind = text.get("model_type", "gemma")
    if kind not in list(_TEXT_DEFAULTS):  # a list, so that kind may be anything
        raise ValueError(f"config.json: unknown text model_type {kind!r}; this model has a decoder for {', '.join(_TEXT_DEFAULTS)}")
    if not isinstance(rope := text.get("rope_parameters") or {}, dict):
        raise ValueError(f"config.json: rope_parameters = {rope!r} is no object")
    text = {"model_type": kind} | _TEXT_DEFAULTS[kind] | rope | text
    if kind == "gemma":  # a Gemma 1 decoder has none of these, whatever its config.json says
        gemma1 = dict(sliding_window=None, attn_logit_softcapping=None, final_logit_softcapping=None)
        text |= gemma1 | {"query_pre_attn_scalar": text["head_dim"]}
    _check(json, {"numerics": tuple(NUMERICS)})
    _check(vision, _VISION_FIXED)
    _check(text, _TEXT_FIXED)
    _check({"rope_type": text.get("rope_type"), "rope_scaling": text.get("rope_scaling")}, {"rope_type": ("default", None), "rope_scaling": (None,)})
    config = PaliGemmaConfig(
        VisionConfig(**_known(VisionConfig, vision, "vision_config")),
        DecoderConfig(**_known(DecoderConfig, text, "text_config")),
        image_token_id=_id("image_token_index", json.get("image_token_index", json.get("image_token_id", 256000))),
        eos_token_ids=_eos((generation or {}).get("eos_token_id", json.get("eos_token_id", 1))),
        pad_token_id=_id("pad_token_id", json.get("pad_token_id") or 0),
        numerics=json.get("numerics", "transformers"),  # ours: see write_config
    )
    _check_layer_types(text)
    return check_config(config)


def write_config(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read; `dtype` is that of the weights.

    A profile of numerics that is not the default is written too: transformers keeps the key and ignores it, `read_config` heeds it.
    """
    vision, decoder = config.vision, config.decoder
    text = {f.name: getattr(decoder, f.name) for f in fields(decoder)}
    if decoder.model_type == "gemma":
        for gemma2 in ("query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            del text[gemma2]
    text |= {"hidden_activation": "gelu_pytorch_tanh", "num_image_tokens": vision.num_patches, "dtype": dtype}
    nested = {f.name: getattr(vision, f.name) for f in fields(vision)}
    nested |= {"model_type": "siglip_vision_model", "projection_dim": decoder.hidden_size, "num_image_tokens": vision.num_patches}
    numerics = {} if config.numerics == "transformers" else {"numerics": config.numerics}
    return numerics | {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": config.image_token_id,
        "bos_token_id": 2,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "hidden_size": decoder.hidden_size,
        "projection_dim": decoder.hidden_size,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": nested | {"vision_use_head": False},
    }


def _given(json: dict, key: str) -> dict[str, Any]:
    if not isinstance(json.get(key), dict):
        raise ValueError(f"config.json has no {key}: it is not that of a PaliGemma checkpoint")
    return json[key]


def _known(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    for f in fields(cls):
        kind, _, optional = str(f.type).partition(" | ")
        value, most = values[f.name], 1000 if f.name == "num_hidden_layers" else 2**31
        if kind not in ("int", "float") or (optional and value is None):
            continue
        if type(value) not in (int, float)[: 1 + (kind == "float")] or not 0 < value < most:
            raise ValueError(f"config.json: {where}.{f.name} = {value!r}; it is {'a whole' if kind == 'int' else 'a'} number above 0, below {most}")
    return {f.name: values[f.name] for f in fields(cls)}


def _id(key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"config.json: {key} = {value!r}; a token's id is a whole number from 0")
    return value


def _eos(value: Any) -> tuple[int, ...]:
    return tuple(_id("eos_token_id", i) for i in (value if isinstance(value, list) and value else [1 if value is None else value]))


def check_config(config: PaliGemmaConfig, where: str = "config.json") -> PaliGemmaConfig:
    """The same config; ValueError if its numbers do not fit together."""
    vision, decoder = config.vision, config.decoder
    rules = {
        "vision_config.num_attention_heads divides hidden_size": vision.hidden_size % vision.num_attention_heads == 0,
        "vision_config.patch_size divides image_size": vision.image_size % vision.patch_size == 0,
        "text_config.num_key_value_heads divides num_attention_heads": decoder.num_attention_heads % decoder.num_key_value_heads == 0,
        "text_config.head_dim is even": decoder.head_dim % 2 == 0,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"{where}: it does not hold that {' and '.join(broken)}")
    return config


def _check(values: dict[str, Any], allowed: dict[str, tuple]) -> None:
    for key, choices in allowed.items():
        if key in values and values[key] not in choices:
            raise ValueError(f"config.json: {key} = {values[key]!r} is not supported; known: {', '.join(map(repr, choices))}")


def _check_layer_types(text: dict[str, Any]) -> None:
    expected = ["full_attention" if i % 2 else "sliding_attention" for i in range(text["num_hidden_layers"])]
    if text["model_type"] == "gemma2" and (text.get("layer_types") or expected) != expected:
        raise ValueError("config.json: layer_types is not the alternation sliding, full, sliding, ... of Gemma 2")
