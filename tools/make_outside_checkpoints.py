"""Write small random checkpoints as other programs write them.

Run it in an environment with the versions to try; it needs torch, transformers, peft, bitsandbytes
and accelerate, and nothing of this project:

    python tools/make_outside_checkpoints.py DIRECTORY

Each checkpoint is DIRECTORY/VERSION-KIND. Beside an adapter are `_inputs.npz` and
`_reference.npy`, the logits of its author's program. `tools/check_outside_checkpoints.py` compares
them with this project.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import (
    BitsAndBytesConfig,
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

TOKENIZER = Path(__file__).parents[1] / "paligemma_jax" / "assets" / "tiny" / "tokenizer.model"
IMAGE_ID, VOCABULARY, TEXT_PIECES = 1600, 1664, 448
DECODER = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCABULARY,
)
GEMMA2 = DECODER | dict(query_pre_attn_scalar=18, sliding_window=8)
VISION = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=14,
    image_size=28,
    vision_use_head=False,
)
PROJECTIONS = ["q_proj", "v_proj", "gate_proj"]


def make_model(gemma: int = 2, tied: bool = True) -> PaliGemmaForConditionalGeneration:
    """A model whose norms, biases and head are random too."""
    torch.manual_seed(0)
    decoder = Gemma2Config(**GEMMA2) if gemma == 2 else GemmaConfig(**DECODER)
    config = PaliGemmaConfig(
        text_config=decoder.to_dict() | {"tie_word_embeddings": tied},
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
        image_token_index=IMAGE_ID,
        projection_dim=DECODER["hidden_size"],
        hidden_size=DECODER["hidden_size"],
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def make_processor(**image_settings: object) -> PaliGemmaProcessor:
    images = SiglipImageProcessor(
        size={"height": 28, "width": 28}, image_seq_length=4, **image_settings
    )
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, make_tokenizer())


def make_tokenizer():
    """tiny's tokenizer as transformers reads it, without the extra pieces for turns and images."""
    from transformers import GemmaTokenizerFast

    directory = Path(sys.argv[1]) / "tokenizer"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER, directory)
    tokenizer = GemmaTokenizerFast.from_pretrained(str(directory))
    names = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    tokenizer.add_tokens([transformers.AddedToken(name, normalized=False) for name in names])
    return tokenizer


def save(directory: Path, model, processor=None, **options: object) -> None:
    model.save_pretrained(directory, safe_serialization=True, **options)
    (processor or make_processor()).save_pretrained(directory)


def plain(directory: Path) -> None:
    save(directory, make_model())


def gemma1_bfloat16(directory: Path) -> None:
    save(directory, make_model(gemma=1).to(torch.bfloat16))


def sharded_float16(directory: Path) -> None:
    save(directory, make_model().to(torch.float16), max_shard_size="300KB")


def sharded_then_single(directory: Path) -> None:
    """The index and shards of other weights stay beside model.safetensors."""
    other = make_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    save(directory / "other", other, max_shard_size="300KB")
    save(directory, make_model())
    for file in (directory / "other").glob("model*"):
        shutil.move(file, directory / file.name)
    shutil.rmtree(directory / "other")


def untied(directory: Path) -> None:
    save(directory, make_model(tied=False))


def head_only(directory: Path) -> None:
    """`save_model` of safetensors keeps one name of tied weights."""
    from safetensors.torch import save_model

    model = make_model()
    save(directory, model)
    (directory / "model.safetensors").unlink()
    save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})


def resized(directory: Path) -> None:
    model, processor = make_model(), make_processor()
    processor.tokenizer.add_tokens(["<plain>", "zebra crossing"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + 64)
    save(directory, model, processor)


def other_pixels(directory: Path) -> None:
    settings = dict(image_mean=[0.48, 0.45, 0.4], image_std=[0.27, 0.26, 0.28], resample=2)
    save(directory, make_model(), make_processor(**settings))


def other_ends(directory: Path) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [1, 107]
    save(directory, model)


def quantized(**settings: object) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        source = directory.with_name("dense")
        save(source, make_model().to(torch.bfloat16))
        config = BitsAndBytesConfig(**settings)
        model = PaliGemmaForConditionalGeneration.from_pretrained(
            source, quantization_config=config, device_map={"": "cpu"}, torch_dtype=torch.bfloat16
        )
        save(directory, model)
        shutil.rmtree(source)

    return make


def adapter(**settings: object) -> Callable[[Path], None]:
    """An adapter on a base of the same version, with random factors and saved modules."""

    def make(directory: Path) -> None:
        base = directory.with_name(f"{transformers.__version__}-plain")
        model = PaliGemmaForConditionalGeneration.from_pretrained(
            base, attn_implementation="eager", torch_dtype=torch.float32
        )
        torch.manual_seed(2)
        config = peft.LoraConfig(
            **dict(r=4, lora_alpha=8, target_modules=PROJECTIONS) | settings  # type: ignore[arg-type]
        )
        tuned = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        tuned.eval().save_pretrained(directory)
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {
            "base_model_name_or_path": str(base.resolve())
        }, indent=2))  # fmt: skip
        inputs = make_inputs()
        np.savez(directory / "_inputs.npz", **{k: v.numpy() for k, v in inputs.items()})
        with torch.no_grad():
            logits = tuned(**inputs).logits
        np.save(directory / "_reference.npy", logits.float().numpy())

    return make


def make_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[IMAGE_ID] * 4 + [2, 300, 301, 302]])
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(1, 3, 28, 28, generator=generator) * 2 - 1
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(tokens)
    return dict(input_ids=tokens, pixel_values=pixels, attention_mask=ones, token_type_ids=zeros)


FOUR_BIT = dict(load_in_4bit=True)
KINDS: dict[str, Callable[[Path], None]] = {
    "plain": plain,
    "gemma1-bfloat16": gemma1_bfloat16,
    "sharded-float16": sharded_float16,
    "sharded-then-single": sharded_then_single,
    "untied": untied,
    "head-only": head_only,
    "resized": resized,
    "other-pixels": other_pixels,
    "other-ends": other_ends,
    "bnb-nf4": quantized(**FOUR_BIT, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-double": quantized(
        **FOUR_BIT, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bnb-nf4-storage": quantized(
        **FOUR_BIT, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "bnb-fp4": quantized(**FOUR_BIT),
    "bnb-int8": quantized(load_in_8bit=True),
    "peft-plain": adapter(),
    "peft-rslora": adapter(use_rslora=True),
    "peft-patterns": adapter(
        rank_pattern={r"layers\.[02]\.self_attn\.q_proj": 2, "v_proj": 8},
        alpha_pattern={r".*language_model.*gate_proj": 5, r"self_attn.q_proj": 3},
    ),
    "peft-dora": adapter(use_dora=True),
    "peft-modules-to-save": adapter(modules_to_save=["multi_modal_projector"]),
    "peft-bias": adapter(bias="lora_only", target_modules=["q_proj", "fc1"]),
    "peft-lora-bias": adapter(lora_bias=True),
    "peft-pissa": adapter(init_lora_weights="pissa"),
    "peft-olora": adapter(init_lora_weights="olora"),
    "peft-embedding": adapter(target_modules=["q_proj", "embed_tokens"]),
    "peft-tokens": adapter(trainable_token_indices={"embed_tokens": [300, 301]}),
}


def main() -> None:
    directory, *kinds = sys.argv[1:]
    for kind in kinds or KINDS:
        target = Path(directory) / f"{transformers.__version__}-{kind}"
        shutil.rmtree(target, ignore_errors=True)
        try:
            KINDS[kind](target)
            print(f"{target.name}: made", flush=True)
        except Exception as error:  # a version may lack a feature
            shutil.rmtree(target, ignore_errors=True)
            print(
                f"{target.name}: not made: {type(error).__name__}: {str(error)[:200]}", flush=True
            )


if __name__ == "__main__":
    main()
