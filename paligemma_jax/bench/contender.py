"""The same model in transformers: to measure against, with the same weights in the same dtype."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.config import write_config
from convert.huggingface import canonical_name
from convert.match import pieces
from convert.table import HUGGINGFACE
from convert.tensor import from_array
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.parity.torch_model import as_torch
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.config import FinetuneConfig


def transformers_model(model: PaliGemma) -> Any:
    """A PaliGemmaForConditionalGeneration with the parameters of `model` (layers as a list), copied one tensor at a time.

    On the GPU if torch sees one. Eager attention: transformers' default for Gemma 2, which alone has its softcap.
    """
    try:
        import torch
        from transformers import CONFIG_MAPPING, PaliGemmaForConditionalGeneration
        from transformers.initialization import no_init_weights
    except ImportError:
        raise ValueError("to measure against transformers, install the extra: pip install 'paligemma-jax[test]'") from None
    torch.set_num_threads(os.cpu_count() or 1)
    values = parameters(model)
    dtype = values["decoder/embedder/table"].dtype.name
    config = write_config(model.config, dtype)
    config = CONFIG_MAPPING["paligemma"].from_dict(config, attn_implementation="eager")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), no_init_weights():
        copy = PaliGemmaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    copy.tie_weights()
    of = {piece.key: piece for piece in pieces(HUGGINGFACE[model.config.decoder.model_type], model.config)}
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            piece = of.pop(canonical_name(name))
            parameter.copy_(as_torch(piece.there(from_array(values[piece.path])).load()))
    assert not of, f"transformers has no {', '.join(of)}"
    return copy


def generator(model: Any, inputs: Inputs, new: int, compiled: bool = False) -> Callable[[], tuple[float, float]]:
    """A function that generates `new` greedy tokens for every row: seconds until the first one, and from there to the last.

    compiled: with torch.compile and the static cache that it needs.
    """
    import torch
    from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if len(times) in (1, new):
                input_ids.cpu()  # waits for the device
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    times: list[float] = []
    options: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, stopping_criteria=StoppingCriteriaList([Clock()]))
    if compiled:
        options["cache_implementation"] = "static"
        settings: Any = CompileConfig(fullgraph=False)
        settings._compile_all_devices = True
        options["compile_config"] = settings

    def run() -> tuple[float, float]:
        times[:] = [time.perf_counter()]
        with torch.no_grad():
            tokens = model.generate(**{name: array.to(model.device) for name, array in batch.items()}, **options)
        assert tokens.shape[1] == inputs.tokens.shape[1] + new
        return times[1] - times[0], times[-1] - times[1]

    batch = _batch(model, inputs)
    return run


def trainer(model: Any, inputs: Inputs, config: FinetuneConfig) -> Callable[[], tuple[float, float]]:
    """A function that makes one step of AdamW, eager, in training mode: 0, and its seconds. LoRA is peft's, on the same products."""
    import torch

    if config.lora:
        try:
            import peft
        except ImportError:
            raise ValueError("to measure LoRA against transformers, install the extra: pip install 'paligemma-jax[test]'") from None
        target = r".*language_model.*\.(self_attn|mlp)\.\w+_proj"
        model = peft.get_peft_model(model, peft.LoraConfig(r=config.lora_rank, lora_alpha=int(config.lora_alpha), target_modules=target))
    if config.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
    batch = {name: array.to(model.device) for name, array in _batch(model, inputs).items()}
    labels = torch.where(torch.from_numpy(np.array(inputs.targets)), torch.from_numpy(inputs.tokens).long(), -100).to(model.device)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert np.isfinite(loss.item())  # waits for the device
        return 0.0, time.perf_counter() - start

    return run


def _batch(model: Any, inputs: Inputs) -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.from_numpy(inputs.tokens).long(),
        "pixel_values": torch.from_numpy(np.moveaxis(inputs.images, 3, 1).copy()).to(model.dtype),
        "attention_mask": torch.from_numpy(inputs.valid).long(),
        "token_type_ids": torch.from_numpy(np.array(inputs.targets)).long(),
    }
