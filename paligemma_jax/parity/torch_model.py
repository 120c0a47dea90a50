"""transformers' model of a case, with its weights in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from convert.config import config_to_json
from convert.huggingface import canonical_name
from convert.match import huggingface_weights
from convert.tensor import Tensor, from_array
from paligemma_jax.model.numerics import Numerics
from paligemma_jax.parity.case import ParityCase
from paligemma_jax.parity.torch_loading import check_sizes, load_reference
from paligemma_jax.processing.processor import Inputs

if TYPE_CHECKING:
    import torch
    from transformers import PaliGemmaConfig as TorchConfig
    from transformers import PaliGemmaForConditionalGeneration as TorchModel

    Readers = dict[torch.nn.Parameter, Callable[[], torch.Tensor]]


def build_model(case: ParityCase, weights: str, dtype: str, keep: bool) -> TorchModel:
    """transformers' model of a case, adapted to its numerics.

    Args:
        case: Names the directory that transformers reads, or has the tensors.
        weights: "float32" or "bfloat16", to which the weights are rounded.
        dtype: Dtype of parameters and activations.
        keep: Keep the weights once they are read. Otherwise each module reads its own when it is
            called, so that only the largest tensor has to fit in memory.

    Raises:
        ValueError: transformers cannot load it, or its model has other sizes.
    """
    if case.source is None:
        model = _empty_model(_torch_config(case, dtype), dtype)
        _stream(model, _checkpoint_readers(model, case, dtype), dtype, keep)
    elif keep:
        model = load_reference(case.source, dtype)
        for parameter in model.parameters():
            parameter.data = _rounded(parameter.data, weights, dtype)
    else:
        mapped = load_reference(case.source, "auto")
        model = _empty_model(mapped.config, dtype)  # its buffers are not rounded to "auto"
        model.generation_config = mapped.generation_config
        data = {name: parameter.data for name, parameter in mapped.named_parameters()}
        readers = {
            parameter: partial(_rounded, data[name], weights, dtype)
            for name, parameter in model.named_parameters()
        }
        _stream(model, readers, dtype, keep)
    check_sizes(model, case.checkpoint.config)
    adapt_model(model, case.checkpoint.config.profile)
    return model


def _torch_config(case: ParityCase, dtype: str) -> TorchConfig:
    """config.json as transformers reads it, if there is one; otherwise the checkpoint's config."""
    from transformers import AutoConfig, PaliGemmaConfig

    if case.directory is not None and (case.directory / "config.json").exists():
        return AutoConfig.from_pretrained(case.directory)  # type: ignore[return-value]
    return PaliGemmaConfig.from_dict(config_to_json(case.checkpoint.config, dtype))


def _empty_model(config: TorchConfig, dtype: str) -> TorchModel:
    """The model without weights."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights():  # allocates, but touches no memory
        model = PaliGemmaForConditionalGeneration._from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
    model.tie_weights()
    return model


def _checkpoint_readers(model: TorchModel, case: ParityCase, dtype: str) -> Readers:
    """Readers of the tensors of the checkpoint, by the names and layouts that `convert` knows."""
    import torch

    tensors = {
        weight.key: weight.to_file(case.checkpoint.tensors[weight.path])
        for weight in huggingface_weights(case.checkpoint.config)
    }

    def reader(tensor: Tensor) -> Callable[[], torch.Tensor]:
        return lambda: as_torch(tensor.load()).to(getattr(torch, dtype))

    readers = {
        parameter: reader(tensors.pop(canonical_name(name)))
        for name, parameter in model.named_parameters()
    }
    assert not tensors, f"transformers has no {', '.join(sorted(tensors))}"
    return readers


def _rounded(data: torch.Tensor, weights: str, dtype: str) -> torch.Tensor:
    """A tensor in `dtype`, rounded to the dtype `weights`."""
    import torch

    return data.to(getattr(torch, weights)).to(getattr(torch, dtype))


def _stream(model: TorchModel, readers: Readers, dtype: str, keep: bool) -> None:
    """Read a module's parameters before each call, and free them after it unless `keep`."""
    import torch

    def read(module: torch.nn.Module, _inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.numel() == 0:
                parameter.data = readers[parameter]()

    def free(module: torch.nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=getattr(torch, dtype))

    for module in model.modules():
        free(module)
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(read)
            if not keep:
                module.register_forward_hook(free)


def adapt_model(model: TorchModel, numerics: Numerics) -> None:
    """Make transformers compute a profile, as far as its config can express it. Positions are
    passed with the batch."""
    text = model.config.get_text_config()
    if numerics.window == "none" and getattr(text, "layer_types", None):
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
    model.requires_grad_(True)  # peft leaves merged weights without
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
    """Greedy tokens int32[B, count], 0 after the end, and for each the gap float32[B, count]
    between the two largest logits."""
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
    end = np.isin(tokens, model.generation_config.eos_token_id or -1)
    tokens[np.cumsum(end, axis=1) - end > 0] = 0  # any pad token of its own
    gaps = (largest[..., 0] - largest[..., 1]).numpy()
    padding = [(0, 0), (0, count - tokens.shape[1])]
    return np.pad(tokens, padding), np.pad(gaps, padding)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory; also for bfloat16, which torch does not accept."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
