"""The transformers counterpart of a model, with the same weights and dtype, for comparison."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from convert.config import config_to_json
from convert.huggingface import canonical_name
from convert.match import huggingface_weights
from convert.tensor import from_array
from paligemma_jax.bench.clock import Run
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.parity.torch_model import as_torch
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.config import FinetuneConfig

if TYPE_CHECKING:
    import torch
    from transformers import PaliGemmaForConditionalGeneration


def transformers_model(model: PaliGemma) -> PaliGemmaForConditionalGeneration:
    """Return the transformers model with the parameters of `model`, whose layers must be a list.

    Tensors are copied one at a time, to the GPU if torch sees one. Attention is eager, which is
    transformers' default for Gemma 2 because only it supports the softcap.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        import torch
        from transformers import CONFIG_MAPPING, PaliGemmaForConditionalGeneration
        from transformers.initialization import no_init_weights
    except ImportError:
        raise ValueError(
            "--against requires transformers: pip install 'paligemma-jax[test]'"
        ) from None
    torch.set_num_threads(os.cpu_count() or 1)
    values = parameters(model)
    dtype = values["decoder/embedder/table"].dtype.name
    eager = dict(attn_implementation="eager")
    config = CONFIG_MAPPING["paligemma"].from_dict(config_to_json(model.config, dtype), **eager)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), no_init_weights():
        copy = PaliGemmaForConditionalGeneration._from_config(
            config, dtype=getattr(torch, dtype), **eager
        )
    copy.eval().tie_weights()
    missing = {weight.key: weight for weight in huggingface_weights(model.config)}
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            weight = missing.pop(canonical_name(name))
            tensor = weight.to_file(from_array(values[weight.path]))
            parameter.copy_(as_torch(tensor.load()))
    assert not missing, f"transformers has no {', '.join(missing)}"
    return copy


def generator(
    model: PaliGemmaForConditionalGeneration, inputs: Inputs, new: int, compiled: bool = False
) -> Run:
    """Return a function that generates `new` greedy tokens for every row.

    Args:
        compiled: Use torch.compile, and the static cache that it requires.
    """
    import torch
    from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if len(times) in (1, new):
                input_ids.cpu()  # wait for the device
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options: dict[str, object] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    options["stopping_criteria"] = StoppingCriteriaList([Clock()])
    if compiled:
        compile_config = CompileConfig(fullgraph=False)
        compile_config._compile_all_devices = True  # type: ignore[assignment]
        options |= {"cache_implementation": "static", "compile_config": compile_config}
    batch = _torch_batch(model, inputs)

    def run() -> tuple[float, float]:
        times[:] = [time.perf_counter()]
        with torch.no_grad():
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = model.generate(**on_device, **options)  # type: ignore[attr-defined]
        assert tokens.shape[1] == inputs.tokens.shape[1] + new
        return times[1] - times[0], times[-1] - times[1]

    return run


def trainer(
    model: PaliGemmaForConditionalGeneration, inputs: Inputs, config: FinetuneConfig
) -> Run:
    """Return a function that runs one eager AdamW step in training mode.

    LoRA is peft's, on the same matrices.

    Raises:
        ValueError: peft is not installed.
    """
    import torch

    if config.lora:
        try:
            import peft
        except ImportError:
            raise ValueError(
                "--train lora --against requires peft: pip install 'paligemma-jax[test]'"
            ) from None
        adapter = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=int(config.lora_alpha),
            target_modules=r".*language_model.*\.(self_attn|mlp)\.\w+_proj",
        )
        model = peft.get_peft_model(model, adapter)  # type: ignore[assignment]
    if config.remat == "full":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=0.0)
    batch = _torch_batch(model, inputs)
    targets = torch.from_numpy(np.array(inputs.targets))
    batch["labels"] = torch.where(targets, batch["input_ids"], -100)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert np.isfinite(loss.item())  # waits for the device
        return 0.0, time.perf_counter() - start

    return run


def _torch_batch(
    model: PaliGemmaForConditionalGeneration, inputs: Inputs
) -> dict[str, torch.Tensor]:
    import torch

    images = np.moveaxis(np.asarray(inputs.images), 3, 1).copy()
    return {
        "input_ids": torch.from_numpy(inputs.tokens).long(),
        "pixel_values": torch.from_numpy(images).to(model.dtype),
        "attention_mask": torch.from_numpy(inputs.valid).long(),
        "token_type_ids": torch.from_numpy(np.array(inputs.targets)).long(),
    }
