"""Hugging Face's config.json <-> `PaliGemmaConfig`, for transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from convert.typed_json import JsonObject, load_json
from paligemma_jax.model.config import NUMERICS, DecoderConfig, PaliGemmaConfig, VisionConfig

# Keys absent from config.json have the defaults of the class that the nested model_type names.
_VISION_DEFAULTS = asdict(
    VisionConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        patch_size=16,
    )
)
_GEMMA = DecoderConfig(
    model_type="gemma",
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    intermediate_size=24576,
    vocab_size=256000,
)
_TEXT_DEFAULTS = {"gemma": asdict(_GEMMA), "gemma2": asdict(DecoderConfig(vocab_size=256000))}
_GEMMA2_KEYS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

# The model has no switch for these settings, so any other value would give wrong results.
_VISION_SUPPORTED = {
    "model_type": ("siglip_vision_model",),
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
}
_TEXT_SUPPORTED = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (True, None),
}
_ROPE_SUPPORTED = {"rope_type": ("default", None), "rope_scaling": (None,)}


def load_config(path: Path) -> PaliGemmaConfig:
    """Load the config of a config.json, or of the directory that contains it. The ids that end an
    answer come from a generation_config.json beside it, if there is one.

    Raises:
        ValueError: The file is missing, or does not describe a supported PaliGemma.
    """
    file = path / "config.json" if path.is_dir() else path
    json, generation = load_json(file), file.with_name("generation_config.json")
    try:
        return config_from_json(json, load_json(generation) if generation.exists() else None)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is malformed: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}") from None


def config_from_json(json: JsonObject, generation: JsonObject | None = None) -> PaliGemmaConfig:
    """The config that a config.json describes.

    Args:
        json: The content of config.json.
        generation: The content of generation_config.json, which has the ids that end an answer.

    Raises:
        ValueError: It does not describe a supported PaliGemma.
    """
    if json.get("model_type") != "paligemma":
        kind = repr(json["model_type"]) if "model_type" in json else "missing"
        raise ValueError(f"config.json: model_type must be 'paligemma', but is {kind}")
    vision, text = _VISION_DEFAULTS | _nested(json, "vision_config"), _nested(json, "text_config")
    text = _complete_text(text)
    check_quantization(json)
    _check_supported(json, {"numerics": tuple(NUMERICS)})
    _check_supported(vision, _VISION_SUPPORTED)
    _check_supported(text, _TEXT_SUPPORTED)
    # rope_type may come from rope_parameters, whose other keys are not checked.
    _check_supported({key: text.get(key) for key in _ROPE_SUPPORTED}, _ROPE_SUPPORTED)
    for name, cls, values in (("vision", VisionConfig, vision), ("text", DecoderConfig, text)):
        _check_numbers(f"{name}_config", cls, values)
    _check_layer_types(text)
    eos = (generation or {}).get("eos_token_id", json.get("eos_token_id", 1))
    image_id = json.get("image_token_index", json.get("image_token_id", 256000))
    config = PaliGemmaConfig(
        VisionConfig(**{f.name: vision[f.name] for f in fields(VisionConfig)}),
        DecoderConfig(**{f.name: text[f.name] for f in fields(DecoderConfig)}),
        image_token_id=_token_id("image_token_index", image_id),
        eos_token_ids=_eos_token_ids(eos),
        pad_token_id=_token_id("pad_token_id", json.get("pad_token_id") or 0),
        numerics=json.get("numerics", "transformers"),  # ours: see config_to_json
    )
    return check_config(config)


def config_to_json(config: PaliGemmaConfig, dtype: str) -> JsonObject:
    """A config.json for transformers 4 and 5; `dtype` is that of the weights.

    Numerics other than the default are a key that transformers keeps and ignores.
    """
    width, patches = config.decoder.hidden_size, config.vision.num_patches
    text = asdict(config.decoder) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "num_image_tokens": patches,
        "dtype": dtype,
    }
    vision = asdict(config.vision) | {
        "model_type": "siglip_vision_model",
        "projection_dim": width,
        "num_image_tokens": patches,
        "vision_use_head": False,
    }
    if config.decoder.model_type == "gemma":
        for key in ("query_pre_attn_scalar", *_GEMMA2_KEYS):
            del text[key]
    numerics = {} if config.numerics == "transformers" else {"numerics": config.numerics}
    return numerics | {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": config.image_token_id,
        "bos_token_id": 2,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "hidden_size": width,
        "projection_dim": width,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }


def check_quantization(json: JsonObject) -> None:
    """Raise ValueError if the weights are quantized in a way that cannot be read."""
    quantization = json.get("quantization_config")
    is_object = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_object else quantization
    if quantization and method != "bitsandbytes":
        supported = "only bitsandbytes checkpoints (nf4 and int8) and unquantized ones can be read"
        raise ValueError(f"config.json: the checkpoint is quantized by {method!r}; {supported}")


def check_config(config: PaliGemmaConfig, source: str = "config.json") -> PaliGemmaConfig:
    """Return the config. Raises ValueError if its sizes do not fit together."""
    vision, decoder = config.vision, config.decoder
    width, heads = vision.hidden_size, vision.num_attention_heads
    query_heads, key_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    rules = {
        "vision_config.num_attention_heads must divide hidden_size": width % heads,
        "vision_config.patch_size must divide image_size": vision.image_size % vision.patch_size,
        "text_config.num_key_value_heads must divide num_attention_heads": query_heads % key_heads,
        "text_config.head_dim must be even": decoder.head_dim % 2,
    }
    broken = [rule for rule, remainder in rules.items() if remainder]
    if broken:
        raise ValueError(f"{source}: {', and '.join(broken)}")
    return config


def _nested(json: JsonObject, key: str) -> JsonObject:
    if not isinstance(json.get(key), dict):
        raise ValueError(f"config.json has no {key}, so it is not that of a PaliGemma")
    return json[key]


def _complete_text(text: JsonObject) -> JsonObject:
    """text_config with defaults, and with rope_parameters (transformers 5) at its top level."""
    kind = text.get("model_type", "gemma")
    if kind not in list(_TEXT_DEFAULTS):  # a list, since kind may be unhashable
        known = ", ".join(_TEXT_DEFAULTS)
        raise ValueError(f"config.json: text model_type must be one of {known}, got {kind!r}")
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters must be an object, got {rope!r}")
    text = _TEXT_DEFAULTS[kind] | rope | text
    if kind == "gemma":  # Gemma 1 has none of these, whatever config.json contains
        text |= dict.fromkeys(_GEMMA2_KEYS) | {"query_pre_attn_scalar": text["head_dim"]}
    return text


def _check_numbers(section: str, cls: type, values: JsonObject) -> None:
    """Raise ValueError unless all numeric fields of `cls` are positive and within limits."""
    for field in fields(cls):
        kind, _, optional = str(field.type).partition(" | ")
        value = values[field.name]
        if kind not in ("int", "float") or (optional and value is None):
            continue
        limit = 1000 if field.name == "num_hidden_layers" else 2**31
        types = (int,) if kind == "int" else (int, float)
        if type(value) not in types or not 0 < value < limit:
            expected = f"{'an integer' if kind == 'int' else 'a number'} above 0 and below {limit}"
            name = f"{section}.{field.name}"
            raise ValueError(f"config.json: {name} must be {expected}, got {value!r}")


def _token_id(key: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"config.json: {key} must be a token id of at least 0, got {value!r}")
    return value


def _eos_token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) and value else [1 if value is None else value]
    return tuple(_token_id("eos_token_id", token) for token in ids)


def _check_supported(values: JsonObject, supported: Mapping[str, tuple]) -> None:
    for key, choices in supported.items():
        if key in values and values[key] not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"config.json: {key} must be {known}, got {values[key]!r}")


def _check_layer_types(text: JsonObject) -> None:
    layers = range(text["num_hidden_layers"])
    expected = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    if text["model_type"] == "gemma2" and (text.get("layer_types") or expected) != expected:
        raise ValueError("config.json: layer_types must alternate sliding and full attention")
