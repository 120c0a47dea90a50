"""Random PaliGemma checkpoints made by transformers, designed to expose mistakes, and transformers'
outputs on them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from paligemma_jax.processing.processor import Inputs

VOCAB, IMAGE = 500, 450  # table rows, and the `<image>` id: 450 pieces of text, then unused rows

TEXT = {
    "pg2": dict(
        hidden_size=56,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        intermediate_size=72,
        query_pre_attn_scalar=18,
        sliding_window=8,
        vocab_size=VOCAB,
    ),
    "pg1": dict(
        hidden_size=56,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=20,
        intermediate_size=72,
        vocab_size=VOCAB,
    ),
}
VISION = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=52,
    patch_size=14,
    image_size=56,
    vision_use_head=False,
    projection_dim=56,
)


def random_model(
    kind: str = "pg2",
    seed: int = 0,
    scale: float = 1.0,
    text: dict | None = None,
    vision: dict | None = None,
    image_id: int = IMAGE,
):
    """A float32 PaliGemmaForConditionalGeneration with every weight random, norms and biases too,
    and logits with a standard deviation of about 4."""
    torch.manual_seed(seed)
    text = TEXT[kind] | (text or {})
    config_class = Gemma2Config if kind == "pg2" else GemmaConfig
    config = PaliGemmaConfig(
        text_config=config_class(pad_token_id=0, **text),
        vision_config=SiglipVisionConfig(**VISION | (vision or {})),
        image_token_index=image_id,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if re.search(r"norm\d?\.(weight|bias)$", name):
                p.copy_(
                    torch.randn_like(p) * 0.3
                    + (1 if "layer_norm" in name or "post_layernorm" in name else 0)
                    * name.endswith("weight")
                )
            elif name.endswith("bias"):
                p.copy_(torch.randn_like(p) * 0.3)
            else:
                fan_in = np.prod(p.shape[1:])
                # sharp attention; small embeddings, so that tokens do not just repeat themselves
                factor = (
                    1.5
                    if "q_proj" in name or "k_proj" in name
                    else 0.2
                    if "embed_tokens" in name
                    else 1
                )
                p.copy_(torch.randn_like(p) * fan_in**-0.5 * scale * factor)
        model.model.language_model.norm.weight.add_(20 * scale)  # logits of std 4 again
    return model


def save_checkpoint(
    model,
    directory: Path,
    layout: str = "released",
    dtype=torch.float32,
    shards: bool = False,
    head: bool = False,
) -> Path:
    """Write `model` in a key layout: "released" (transformers 4), "v5" (as 5 saves it) or "memory"
    (in-memory names of 5)."""
    directory = Path(directory)
    model = copy.deepcopy(model).to(dtype)  # the caller's stays in float32
    model.save_pretrained(directory, max_shard_size="200KB" if shards else "10GB")
    if layout != "v5":
        _rename(directory, RELEASED if layout == "released" else MEMORY)
    if head:
        first = sorted(directory.glob("*.safetensors"))[0]
        tensors = load_file(first)
        key = "lm_head.weight" if layout == "memory" else "language_model.lm_head.weight"
        tensors[key] = model.lm_head.weight.detach().to(dtype).clone()
        save_file(tensors, first, metadata={"format": "pt"})
    return directory


RELEASED = [(r"^vision_tower\.", "vision_tower.vision_model.")]
MEMORY = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^multi_modal", "model.multi_modal"),
]


def _rename(directory: Path, rules) -> None:
    def rename(key):
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return key

    for file in directory.glob("*.safetensors"):
        save_file(
            {rename(key): value for key, value in load_file(file).items()},
            file,
            metadata={"format": "pt"},
        )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {rename(key): value for key, value in content["weight_map"].items()}
        index.write_text(json.dumps(content))


def old_config(directory: Path) -> None:
    """Rewrite config.json as transformers 4.4x did: torch_dtype, rope_theta, and only values that
    differ from the class defaults."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    text = config["text_config"]
    defaults = (Gemma2Config if text["model_type"] == "gemma2" else GemmaConfig)().to_dict()
    for key in (
        "rope_parameters",
        "layer_types",
        "use_bidirectional_attention",
        "dtype",
        "_name_or_path",
    ):
        text.pop(key, None)
    for key in [
        key
        for key in text
        if key != "model_type" and key in defaults and text[key] == defaults[key]
    ]:
        del text[key]
    vision = config["vision_config"]
    for key in ("layer_norm_eps", "num_channels", "hidden_act", "dtype"):
        vision.pop(key, None)
    vision |= {"projector_hidden_act": "gelu_fast", "vision_use_head": False}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config.pop("vocab_size", None)
    file.write_text(json.dumps(config))


def random_inputs(
    model,
    rows=((1, 5, 4), (1, 3, 0)),
    seed: int = 0,
    side: str = "left",
    order: str = "first",
    length: int | None = None,
) -> Inputs:
    """A ragged batch of random ids and pixels, from rows of (images, prompt tokens, suffix tokens).
    The `order` "mixed" puts text between images."""
    rng = np.random.default_rng(seed)
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    built = []
    for images, prompt, suffix in rows:
        words = rng.integers(5, IMAGE, prompt + 1).tolist()
        image = [config.image_token_index] * patches
        head = (
            image * images
            if order == "first"
            else sum(([words[0], *image] for _ in range(images)), [])
        )
        ids = head + [2] + words[1:] + [6]
        answer = [*rng.integers(5, IMAGE, suffix - 1).tolist(), 1] if suffix else []
        built.append((ids, answer))
    width = length or max(len(ids) + len(answer) for ids, answer in built)
    tokens, valid, prefix, targets = (
        np.zeros((len(rows), width), kind) for kind in (np.int32, bool, bool, bool)
    )
    for row, (ids, answer) in enumerate(built):
        start = width - len(ids) - len(answer) if side == "left" else 0
        middle, end = start + len(ids), start + len(ids) + len(answer)
        tokens[row, start:end] = ids + answer
        valid[row, start:end], prefix[row, start:middle], targets[row, middle:end] = (
            True,
            True,
            True,
        )
    size = config.vision_config.image_size
    pixels = rng.uniform(-1, 1, (sum(row[0] for row in rows), size, size, 3)).astype(np.float32)
    return Inputs(tokens, pixels, valid, prefix, targets)


def hf_inputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The same batch as arguments of transformers' model."""
    return {
        "input_ids": torch.tensor(inputs.tokens).long(),
        "pixel_values": torch.tensor(np.moveaxis(inputs.images, 3, 1).copy()),
        "attention_mask": torch.tensor(inputs.valid).long(),
        "token_type_ids": torch.tensor(inputs.targets).long(),
    }


@torch.no_grad()
def hf_logits(model, inputs: Inputs) -> np.ndarray:
    """transformers' teacher-forced logits [B, T, V], with positions that skip pads, as in its
    generate()."""
    batch = hf_inputs(inputs)
    batch["position_ids"] = batch["attention_mask"].cumsum(1).clamp(min=1)
    return model(**batch).logits.float().numpy()


@torch.no_grad()
def hf_stages(model, inputs: Inputs) -> dict[str, np.ndarray]:
    """transformers' values for the stages of `Predictor.stages`, under the same names, attention
    weights included."""
    stages, vision, text = {}, model.model.vision_tower, model.model.language_model
    vision = getattr(vision, "vision_model", vision)

    def keep(name, pick=lambda out: out[0] if isinstance(out, tuple) else out):
        def hook(_, __, out):
            stages[name] = pick(out).float().numpy()

        return hook

    hooks = [
        vision.embeddings.patch_embedding.register_forward_hook(
            keep("vision/patches", lambda out: out.flatten(2).transpose(1, 2))
        ),
        vision.embeddings.register_forward_hook(keep("vision/embeddings")),
        vision.post_layernorm.register_forward_hook(keep("vision/output")),
        model.model.multi_modal_projector.register_forward_hook(keep("projector")),
        text.layers[0].register_forward_pre_hook(
            lambda _, args: stages.__setitem__("decoder/embeddings", args[0].float().numpy())
        ),
        text.norm.register_forward_hook(keep("decoder/norm")),
    ]
    for name, layers in (("vision", vision.encoder.layers), ("decoder", text.layers)):
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_hook(keep(f"{name}/layers/{i}")))
            hooks.append(
                layer.self_attn.register_forward_hook(
                    keep(f"{name}/layers/{i}/attention/weights", lambda out: out[1])
                )
            )
    stages["logits"] = hf_logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return stages


# LayerNorms are around 1, RMSNorms around 0. Little attention to the 256 image tokens: otherwise
# every next token would be the same.
OFFSETS = {
    "layer_norm": 1,
    "vision_model.post_layernorm": 1,
    "language_model.model.norm": 20,
    "post_attention_layernorm": -0.7,
}


def write_random(
    directory: Path, preset: str, dtype: str = "float32", seed: int = 0, shard_bytes: int = 2**31
) -> Path:
    """Write a random checkpoint of a published size, with one shard in memory at a time."""
    import jax
    from safetensors.numpy import save_file as save_arrays

    from convert.config import config_to_json
    from convert.huggingface import INDEX
    from convert.match import file_shapes, huggingface_weights
    from paligemma_jax.model.config import PaliGemmaConfig as Config

    config = Config.preset(preset)
    directory.mkdir(parents=True, exist_ok=True)
    rng, shard, weight_map, number = np.random.default_rng(seed), {}, {}, 1

    def flush():
        nonlocal shard, number
        name = f"model-{number:05}.safetensors"
        save_arrays(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, number = {}, number + 1

    for name, shape in file_shapes(huggingface_weights(config)).items():
        offset = next(
            (value for key, value in OFFSETS.items() if key in name and name.endswith("weight")), 0
        )
        std = (
            0.3
            if len(shape) == 1
            else np.prod(shape[1:]) ** -0.5 * (0.2 if "embed_tokens" in name else 1)
        )
        array = rng.standard_normal(shape, np.float32) * np.float32(std) + np.float32(offset)
        shard[name] = array.astype(jax.numpy.dtype(dtype))
        if sum(a.nbytes for a in shard.values()) > shard_bytes:
            flush()
    flush()
    (directory / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(json.dumps(config_to_json(config, dtype)))
    return directory
