"""The transformers counterpart of a model, with the same weights and dtype, for comparison."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
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

    Tensors are copied one at a time, to the GPU if torch sees one. Attention is what transformers
    chooses: torch's fused one in the image encoder and in Gemma 1, a plain one in Gemma 2, because
    torch's has no softcap.

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
    config = CONFIG_MAPPING["paligemma"].from_dict(config_to_json(model.config, dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), no_init_weights():
        copy = PaliGemmaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    copy.eval().tie_weights()
    missing = {weight.key: weight for weight in huggingface_weights(model.config)}
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            weight = missing.pop(canonical_name(name))
            tensor = weight.to_file(from_array(values[weight.path]))
            parameter.copy_(as_torch(tensor.load()))
    assert not missing, f"transformers has no {', '.join(missing)}"
    return copy


def eager_generator(model: PaliGemmaForConditionalGeneration, inputs: Inputs, new: int) -> Run:
    """Return a function that generates `new` greedy tokens for every row, as users do."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if len(times) in (1, new):
                input_ids.cpu()  # wait for the device
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options: dict[str, object] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    options["stopping_criteria"] = StoppingCriteriaList([Clock()])
    batch = torch_batch(model, inputs)

    def run() -> tuple[float, float]:
        times[:] = [time.perf_counter()]
        with torch.no_grad():
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = model.generate(**on_device, **options)  # type: ignore[attr-defined]
        assert tokens.shape[1] == inputs.tokens.shape[1] + new
        return times[1] - times[0], times[-1] - times[1]

    return run


def compiled_generator(model: PaliGemmaForConditionalGeneration, inputs: Inputs, new: int) -> Run:
    """Like `eager_generator`, with torch.compile; it is compiled when this returns."""
    decode = compiled_decoding(model, inputs, new)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        tokens = decode()
        next(tokens).cpu()  # waits for the device
        first = time.perf_counter()
        *_, last = tokens
        last.cpu()
        return first - start, time.perf_counter() - first

    for _ in range(3):  # on a GPU, the first runs only record what later ones replay
        run()
    return run


def compiled_decoding(
    model: PaliGemmaForConditionalGeneration, inputs: Inputs, new: int
) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that yields `new` greedy tokens [B, 1] with a compiled forward pass.

    transformers' `generate` fails on PaliGemma 2 with its static cache (5.23), so this is the loop
    that a user can write instead: prefill and decoding through one function, compiled for both
    shapes, over a static cache. All layers have a full-length cache, local layers too. Those that
    transformers makes have a length that torch.compile takes for a constant, and move all of their
    slots at every step beyond the window.
    """
    import torch
    from transformers.cache_utils import Cache, StaticLayer

    torch.compiler.reset()  # forgets earlier shapes: beyond 8, torch would not compile any more
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # a check of inputs that splits the graph
    config, (rows, length) = model.config.get_text_config(), inputs.tokens.shape
    cache = Cache(layers=[StaticLayer(length + new) for _ in range(config.num_hidden_layers)])
    heads, head_dim = config.num_key_value_heads, config.head_dim
    cache.early_initialization(rows, heads, head_dim, model.dtype, model.device)
    batch = torch_batch(model, inputs)
    mask = torch.ones(rows, length + new, dtype=torch.long, device=model.device)

    def choose(**inputs: torch.Tensor) -> torch.Tensor:
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # with CUDA graphs
    compiled = torch.compile(choose, mode=mode, dynamic=False)

    @torch.no_grad()
    def decode() -> Iterator[torch.Tensor]:
        cache.reset()
        arguments = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for _ in range(new):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(**arguments).clone()  # a CUDA graph reuses the memory of its results
            yield token
            arguments = {"input_ids": token, "attention_mask": mask}

    return decode


GENERATORS = {"transformers": eager_generator, "transformers-compile": compiled_generator}


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
    batch = torch_batch(model, inputs)
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


def torch_batch(
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
