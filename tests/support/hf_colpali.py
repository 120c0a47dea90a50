"""Random ColPali checkpoints of transformers, of colpali-engine, and as adapters of peft."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.hf_models import VISION, random_model, save_checkpoint
from support.hf_processor import hf_processor, train_tokenizer
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    PaliGemmaForConditionalGeneration,
)

SIZE = 16  # length of a vector


def make_processor(directory: Path) -> ColPaliProcessor:
    """Make a directory with tokenizer.model, and the processor of what will be in it."""
    directory.mkdir(parents=True)
    train_tokenizer(directory / "tokenizer.model")
    processor = hf_processor(directory, VISION["image_size"], VISION["patch_size"])
    return ColPaliProcessor(processor.image_processor, processor.tokenizer)


def make_colpali(kind: str, directory: Path) -> tuple[ColPaliForRetrieval, ColPaliProcessor]:
    """Write a float32 checkpoint in the layout of transformers 5, with tokenizer.model."""
    processor = make_processor(directory)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    base = random_model(kind, 3, text={"vocab_size": image_id + 8}, image_id=image_id)
    torch.manual_seed(0)
    model = ColPaliForRetrieval(ColPaliConfig(vlm_config=base.config, embedding_dim=SIZE)).eval()
    model.vlm.load_state_dict(base.model.state_dict())
    model.save_pretrained(directory)
    return model, processor


class EngineColPali(torch.nn.Module):
    """The module tree of colpali-engine's `ColPali`, which names the tensors of its files."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, size: int = SIZE):
        super().__init__()
        self.model = model
        self.custom_text_proj = torch.nn.Linear(model.config.text_config.hidden_size, size)

    def forward(self, attention_mask: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(attention_mask=attention_mask, **batch).last_hidden_state
        vectors = self.custom_text_proj(hidden)
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        return vectors * attention_mask.unsqueeze(-1)


def make_engine_colpali(
    directory: Path, projection: bool = True
) -> tuple[EngineColPali, ColPaliProcessor]:
    """Write a base checkpoint of colpali-engine, or the PaliGemma in it without a projection."""
    processor = make_processor(directory)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    base = random_model("pg1", 4, text={"vocab_size": image_id + 8}, image_id=image_id)
    torch.manual_seed(1)
    model = EngineColPali(base).eval()
    save_checkpoint(base, directory)
    if projection:
        tensors = load_file(directory / "model.safetensors")
        tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
        own = {f"custom_text_proj.{key}": x for key, x in model.custom_text_proj.named_parameters()}
        save_file(tensors | own, directory / "model.safetensors")
    return model, processor


def make_adapter(model: torch.nn.Module, base: Path, directory: Path, **options: object):
    """Wrap a model with random LoRA factors, and save them as peft does. Saved modules change."""
    model.name_or_path = str(base)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", **options)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(directory)
    return adapted
