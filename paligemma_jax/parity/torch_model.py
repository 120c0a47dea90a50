"""transformers' model, with its weights streamed from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convert.checkpoint import Checkpoint
from convert.config import config_to_json
from convert.huggingface import HEAD, TABLE, canonical_name
from convert.match import huggingface_weights
from convert.tensor import Tensor, from_array
from paligemma_jax.model.config import Numerics
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.processing.processor import Inputs

if TYPE_CHECKING:
    import torch
    from transformers import PaliGemmaForConditionalGeneration as TorchModel

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]


def build_model(
    checkpoint: Checkpoint, directory: Path | None, dtype: str, keep: bool
) -> TorchModel:
    """transformers' model without weights: each module reads its own when it is called.

    Only the largest tensor has to fit in memory, and only transformers' own code runs. Attention is
    eager, the only implementation with Gemma 2's softcap.

    Args:
        checkpoint: The weights; they are cast from its dtype to `dtype`.
        directory: Where transformers reads config.json itself. Without one, it gets the
            checkpoint's config.
        dtype: Dtype of parameters and activations.
        keep: Keep the weights once they are read.
    """
    try:
        import torch
        from transformers import AutoConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
        from transformers.initialization import no_init_weights
        from transformers.utils import logging
    except ImportError:
        raise ValueError(
            "comparing with transformers requires the parity extra: "
            "pip install 'paligemma-jax[parity]'"
        ) from None
    logging.set_verbosity_error()
    # Threads cost a small model more in waiting than they save.
    torch.set_num_threads(1 if checkpoint.nbytes < 2**27 else os.cpu_count() or 1)
    if directory is not None and (directory / "config.json").exists():
        config = AutoConfig.from_pretrained(directory)
    else:
        config = PaliGemmaConfig.from_dict(config_to_json(checkpoint.config, dtype))
    with no_init_weights():  # allocates, but touches no memory
        model = PaliGemmaForConditionalGeneration._from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
    model.tie_weights()
    tensors = {
        weight.key: weight.to_file(checkpoint.tensors[weight.path])
        for weight in huggingface_weights(checkpoint.config)
    }
    tensors[HEAD] = tensors[TABLE]
    unused = set(tensors)
    for path, module in model.named_modules():
        keys = {
            canonical_name(f"{path}.{name}"): parameter
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        if keys:
            _stream(module, {keys[key]: tensors[key] for key in keys}, keep)
            unused -= set(keys)
    assert not unused, f"transformers has no {', '.join(sorted(unused))}"
    return model


def _stream(module: torch.nn.Module, tensors: dict[torch.nn.Parameter, Tensor], keep: bool) -> None:
    """Read the module's parameters before each call, and free them after it unless `keep`."""
    import torch

    def read(*_) -> None:
        for parameter, tensor in tensors.items():
            if parameter.numel() == 0:
                parameter.data = as_torch(tensor.load()).to(parameter.dtype)

    def free(*_) -> None:
        for parameter in tensors:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    free()
    module.register_forward_pre_hook(read)
    if not keep:
        module.register_forward_hook(free)


def adapt_model(model: TorchModel, numerics: Numerics) -> None:
    """Make transformers compute a profile, as far as its config can express it. Positions are
    passed with the batch."""
    text = model.config.get_text_config()
    if not numerics.sliding_window and getattr(text, "layer_types", None):
        text.layer_types[:] = ["full_attention"] * len(text.layer_types)
    if not numerics.capped_prefill and hasattr(text, "final_logit_softcapping"):
        text.final_logit_softcapping = None


def model_inputs(inputs: Inputs, numerics: Numerics) -> dict[str, torch.Tensor]:
    """Arguments of transformers' forward. Positions skip pads, as its `generate` counts them."""
    import torch

    def integers(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).long()

    valid = integers(inputs.valid)
    batch = {
        "input_ids": integers(inputs.tokens),
        "attention_mask": valid,
        "token_type_ids": integers(inputs.targets),
        "position_ids": (valid.cumsum(1) - 1).clamp(min=0) + numerics.first_position,
    }
    if inputs.images is not None:
        batch["pixel_values"] = torch.from_numpy(np.moveaxis(inputs.images, 3, 1).copy())
    return batch


def compute_loss(logits: np.ndarray, inputs: Inputs) -> np.ndarray:
    """transformers' loss of logits, the mean over all targets: float32[1]."""
    import torch

    return _loss(torch.from_numpy(logits), inputs).numpy()[None]


def _loss(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.from_numpy(np.where(inputs.targets, inputs.tokens, -100)).long()
    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])


def compute_gradients(model: TorchModel, case: ParityCase) -> dict[str, np.ndarray]:
    """Gradients of the loss, by this project's paths and in its layouts. The model must keep its
    weights."""
    config = case.checkpoint.config
    logits = model(**model_inputs(case.inputs, config.profile)).logits
    _loss(logits, case.inputs).backward()
    gradients = {
        canonical_name(name): from_array(parameter.grad.numpy())  # type: ignore[union-attr]
        for name, parameter in model.named_parameters()
    }
    return {
        weight.path: weight.from_file(gradients[weight.key]).load()
        for weight in huggingface_weights(config)
    }


def generate_greedily(
    model: TorchModel, inputs: Inputs, numerics: Numerics, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens int32[B, count], and for each the gap float32[B, count] between the two largest
    logits."""
    import torch

    batch = model_inputs(inputs, numerics)
    del batch["position_ids"]  # generate counts them itself
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    largest = torch.stack(output.logits, 1).float().topk(2).values
    tokens = output.sequences[:, inputs.tokens.shape[1] :].numpy().astype(np.int32)
    gaps = (largest[..., 0] - largest[..., 1]).numpy()
    padding = [(0, 0), (0, count - tokens.shape[1])]
    return np.pad(tokens, padding), np.pad(gaps, padding)


def compare_processors(case: ParityCase) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name of every model input, its value here, and its value from transformers'
    PaliGemmaProcessor (with PIL)."""
    from transformers import AddedToken, GemmaTokenizer, PaliGemmaProcessor, SiglipImageProcessorPil

    if case.processor is None or case.examples is None or case.inputs.images is None:
        return
    _, prompts, suffixes = case.examples
    vision = case.checkpoint.config.vision
    tokenizer = GemmaTokenizer.from_pretrained(str(case.directory), local_files_only=True)
    # Before <image>, as in the released checkpoints.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOCATIONS])
    size = {"height": vision.image_size, "width": vision.image_size}
    image_processor = SiglipImageProcessorPil(size=size)
    image_processor.image_seq_length = vision.num_patches  # type: ignore[attr-defined]
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    rows = case.processor.encode(*case.examples)
    images = [[Image.open(image) for image in row.images] for row in rows]  # type: ignore[arg-type]
    options = dict(padding=True, padding_side="left", return_tensors="np")
    output = processor(images, prompts, suffix=suffixes, **options)  # type: ignore[arg-type]
    yield "pixels", case.inputs.images, np.moveaxis(output["pixel_values"], 1, 3)
    names = {
        "ids": (case.inputs.tokens, "input_ids"),
        "valid": (case.inputs.valid, "attention_mask"),
        "targets": (case.inputs.targets, "token_type_ids"),
    }
    for name, (ours, key) in names.items():
        yield name, ours.astype(np.int32), output[key].astype(np.int32)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory; also for bfloat16, which torch does not accept."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
