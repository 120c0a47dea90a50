"""A random ColPali of transformers with its processor, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from support.hf_models import VISION, random_model
from support.hf_processor import hf_processor, train_tokenizer
from transformers import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor

SIZE = 16  # length of a vector


def make_colpali(kind: str, directory: Path) -> tuple[ColPaliForRetrieval, ColPaliProcessor]:
    """Write a float32 checkpoint in the layout of transformers 5, with tokenizer.model."""
    directory.mkdir(parents=True)
    train_tokenizer(directory / "tokenizer.model")
    processor = hf_processor(directory, VISION["image_size"], VISION["patch_size"])
    processor = ColPaliProcessor(processor.image_processor, processor.tokenizer)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    base = random_model(kind, 3, text={"vocab_size": image_id + 8}, image_id=image_id)
    torch.manual_seed(0)
    model = ColPaliForRetrieval(ColPaliConfig(vlm_config=base.config, embedding_dim=SIZE)).eval()
    model.vlm.load_state_dict(base.model.state_dict())
    model.save_pretrained(directory)
    return model, processor
