"""Load a checkpoint as transformers, peft and bitsandbytes read it.

Nothing here goes through this project's readers: only the locations of the files come from it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.model.config import PaliGemmaConfig

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration as TorchModel

EXTRA = "requires the parity extra: pip install 'paligemma-jax[parity]'"
# Sizes that must agree for stages to be comparable, under the names of both configs.
SIZES = {
    "vision": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    + ("image_size", "patch_size"),
    "decoder": ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    + ("head_dim", "intermediate_size"),
}


def prepare_torch(threads: int | None = None) -> None:
    """Silence transformers and set torch's number of threads.

    Raises:
        ValueError: They are not installed.
    """
    try:
        import torch
        from transformers.utils import logging as transformers_logging
    except ImportError:
        raise ValueError(f"comparing with transformers {EXTRA}") from None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(threads or os.cpu_count() or 1)


@contextmanager
def reported_by_transformers(action: str) -> Iterator[None]:
    """Turn any error of transformers, peft or bitsandbytes into one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"transformers cannot {action}: it {EXTRA} ({_reason(error)})") from error
    except Exception as error:  # of any kind: it reads files that nothing has checked
        raise ValueError(
            f"transformers {version('transformers')} cannot {action}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_reference(source: CheckpointSource, dtype: str) -> TorchModel:
    """transformers' model of a Hugging Face directory, with an adapter merged by peft and quantized
    matrices dequantized by bitsandbytes.

    Attention is eager, the only implementation with Gemma 2's softcap.

    Args:
        source: The directory, or an adapter on one.
        dtype: Dtype of the parameters; an adapter and its base are in float32. With "auto", that of
            config.json: tensors that have it in the file are mapped, and take no memory.

    Raises:
        ValueError: transformers, peft or bitsandbytes cannot load it, or finds no value for a
            parameter (transformers itself would draw it at random).
    """
    from transformers import PaliGemmaForConditionalGeneration

    options = dict(attn_implementation="eager", local_files_only=True, use_safetensors=True)
    with reported_by_transformers(f"load {source.weights}"):
        model, info = PaliGemmaForConditionalGeneration.from_pretrained(
            source.weights,
            dtype="float32" if source.adapter else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,  # type: ignore[arg-type]
        )
        if getattr(model, "hf_quantizer", None):
            model = _dequantize(model)
    unfilled = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if unfilled:
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise ValueError(
            f"transformers cannot load {source.weights}: the file has no tensor that fits "
            f"{', '.join(unfilled[:3])}{more}"
        )
    if source.adapter:
        model = _merge_adapter(model, source.adapter)
    return model.eval()


def _dequantize(model: TorchModel) -> TorchModel:
    """The model with bitsandbytes' matrices in float32.

    They are flat for it: where blocks cross rows, bitsandbytes 0.50.2 reads wrong scales on a CPU.
    """
    import torch

    shapes = {}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            shapes[name] = state.shape
            state.shape, state.dtype = torch.Size([state.shape.numel()]), torch.float32
    model = model.dequantize(dtype=torch.float32)
    for name, shape in shapes.items():
        weight = model.get_submodule(name).weight
        weight.data = weight.data.reshape(shape)  # type: ignore[union-attr, operator]
    return model


def _merge_adapter(model: TorchModel, adapter: Path) -> TorchModel:
    with reported_by_transformers(f"load the adapter {adapter}"), warnings.catch_warnings():
        from peft import PeftModel

        warnings.simplefilter("ignore", FutureWarning)  # of transformers about itself
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, str(adapter))
        return adapted.merge_and_unload()  # type: ignore[operator]


def check_sizes(model: TorchModel, config: PaliGemmaConfig) -> None:
    """Raise ValueError unless transformers' model has as many layers of the same sizes."""
    for tower, names in SIZES.items():
        there = getattr(model.config, "vision_config" if tower == "vision" else "text_config")
        for name in names:
            ours, theirs = getattr(getattr(config, tower), name), getattr(there, name)
            if ours != theirs:
                raise ValueError(
                    f"both models must have the same sizes to be compared: {tower} {name} is "
                    f"{ours} here and {theirs} in transformers"
                )
