"""Hugging Face's config.json <-> `PaliGemmaConfig`, for transformers 4 and 5."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from msgspec import convert, structs

from convert.config_fields import (
    Gemma,
    Gemma2,
    Generation,
    ModelType,
    PaliGemma,
    PaliGemma2,
    TokenIds,
    check_quantization,
    check_supported,
)
from convert.typed_json import JsonObject, check, load_json
from paligemma_jax.model.config import DecoderConfig, PaliGemmaConfig, VisionConfig

_KINDS: dict[str, type[PaliGemma]] = {"gemma": PaliGemma, "gemma2": PaliGemma2}


def load_config(path: Path) -> PaliGemmaConfig:
    """Load the config of a config.json, or of the directory that contains it. The ids that end an
    answer come from a generation_config.json beside it, if there is one.

    Raises:
        ValueError: The file is missing, or does not describe a supported PaliGemma.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        missing = f"{file.parent} has no {file.name}"
        raise ValueError(f"{missing}: it is not a Hugging Face checkpoint directory")
    json, generation = load_json(file), file.with_name("generation_config.json")
    try:
        return config_from_json(json, load_json(generation) if generation.exists() else None)
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
    kind = _model_type(json)
    top = check(json, _KINDS[kind], "config.json")
    ends = check(generation or {}, Generation, "generation_config.json").eos_token_id
    check_supported(json)
    check_quantization(json)
    config = PaliGemmaConfig(
        VisionConfig(**structs.asdict(top.vision_config)),
        _decoder_config(kind, top),
        image_token_id=_image_token_id(top),
        eos_token_ids=_eos_token_ids(ends, top.eos_token_id, top.text_config.eos_token_id),
        pad_token_id=top.pad_token_id or 0,
        numerics=top.numerics,  # type: ignore[arg-type]
    )
    if top.projection_dim not in (None, config.decoder.hidden_size):
        width = f"text_config.hidden_size, {config.decoder.hidden_size}"
        raise ValueError(f"config.json: projection_dim must be {width}, got {top.projection_dim}")
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
        for name in {field.name for field in fields(DecoderConfig)} - set(Gemma.__struct_fields__):
            text.pop(name, None)
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
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }


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


def _model_type(json: JsonObject) -> str:
    """The type of the decoder of a PaliGemma's config.json: "gemma" or "gemma2"."""
    types = check(json, ModelType, "config.json")
    if types.model_type != "paligemma":
        got = f"got {types.model_type!r}" if types.model_type else "but is missing"
        raise ValueError(f"config.json: model_type must be 'paligemma', {got}")
    kind = types.text_config.model_type if types.text_config else "gemma"
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        name = "text_config.model_type"
        raise ValueError(f"config.json: {name} must be one of {known}, got {kind!r}")
    return kind


def _decoder_config(kind: str, top: PaliGemma) -> DecoderConfig:
    text = top.text_config
    values = structs.asdict(text) | {"model_type": kind}
    values["tie_word_embeddings"] = top.tie_word_embeddings
    rope = text.rope_scaling or text.rope_parameters
    if rope and rope.rope_theta:  # wins over text_config.rope_theta, as in transformers
        values["rope_theta"] = rope.rope_theta
    if isinstance(text, Gemma2):
        layers = range(text.num_hidden_layers)
        expected = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
        if text.layer_types not in (None, expected):
            raise ValueError("config.json: layer_types must alternate sliding and full attention")
    else:  # Gemma 1 has no such scale, window and cap, whatever config.json contains
        values["query_pre_attn_scalar"] = text.head_dim
    return convert({f.name: values.get(f.name) for f in fields(DecoderConfig)}, DecoderConfig)


def _image_token_id(top: PaliGemma) -> int:
    ids = [id for id in (top.image_token_index, top.image_token_id) if id is not None]
    if len(set(ids)) > 1:
        both = f"got {ids[0]} and {ids[1]}"
        raise ValueError(f"config.json: image_token_index and image_token_id must be equal, {both}")
    return ids[0] if ids else 256000


def _eos_token_ids(*sources: TokenIds) -> tuple[int, ...]:
    """The ids of the first source that has any."""
    ids = next((ids for ids in sources if ids not in (None, [])), 1)
    return tuple(ids) if isinstance(ids, list) else (ids,)
