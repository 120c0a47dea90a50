"""transformers' own processor: ids, token types and pixels, and text of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paligemma_jax.model.config import VisionConfig
from paligemma_jax.parity.torch_loading import prepare_torch, reported_by_transformers
from paligemma_jax.processing.processor import Inputs

if TYPE_CHECKING:
    from transformers import PaliGemmaProcessor

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
IMAGE_CONFIGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class TorchProcessor:
    """transformers' PaliGemmaProcessor of a directory, with PIL."""

    processor: PaliGemmaProcessor
    released: bool  # whether it has the released settings, in the absence of its own

    @classmethod
    def load(cls, directory: Path, vision: VisionConfig) -> TorchProcessor:
        """Load the processor that a directory describes.

        Args:
            directory: Has a tokenizer, and usually a preprocessor_config.json. Without one,
                transformers loads only the tokenizer, and its processor gets the released settings.
            vision: The image size then.

        Raises:
            ValueError: transformers cannot load it.
        """
        prepare_torch()
        from transformers import AutoProcessor

        with reported_by_transformers(f"load the processor of {directory}"):
            if not any((directory / name).exists() for name in IMAGE_CONFIGS):
                return cls(_released_processor(directory, vision), True)
            options = dict(backend="pil", local_files_only=True)
            return cls(AutoProcessor.from_pretrained(directory, **options), False)

    def __call__(
        self, images: Sequence[str], prompts: Sequence[str], suffixes: Sequence[str] | None = None
    ) -> Inputs:
        """The inputs that transformers makes of image files and texts, padded on the left."""
        options = dict(padding=True, padding_side="left", return_tensors="np")
        with reported_by_transformers("process these images and prompts"):
            output = self.processor(
                images=list(images),  # type: ignore[arg-type]
                text=list(prompts),
                suffix=suffixes and list(suffixes),  # type: ignore[arg-type]
                **options,  # type: ignore[arg-type]
            )
        valid, targets = output["attention_mask"] == 1, output["token_type_ids"] == 1
        tokens, pixels = output["input_ids"].astype(np.int32), output["pixel_values"]
        pixels = np.ascontiguousarray(np.moveaxis(pixels, 1, 3), np.float32)
        return Inputs(tokens, pixels, valid, valid & ~targets, targets)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str | None:
        """The piece of an id, if there is one."""
        return self.processor.tokenizer.convert_ids_to_tokens(token)


def _released_processor(directory: Path, vision: VisionConfig) -> PaliGemmaProcessor:
    from transformers import AddedToken, GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil

    tokenizer = GemmaTokenizer.from_pretrained(str(directory), local_files_only=True)
    # Before <image>, as in the released checkpoints.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOCATIONS])
    size = {"height": vision.image_size, "width": vision.image_size}
    images = SiglipImageProcessorPil(size=size)
    images.image_seq_length = vision.num_patches  # type: ignore[attr-defined]
    return PaliGemmaProcessor(images, tokenizer)
