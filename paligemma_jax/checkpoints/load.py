"""Load a model: read a checkpoint tensor by tensor and place each tensor on its devices."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from convert.adapter import replace_parameters
from convert.checkpoint import Checkpoint
from convert.quantized import quantize_checkpoint
from convert.tensor import Tensor
from paligemma_jax import lora
from paligemma_jax.checkpoints.runs import SOFT_PROMPT
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.layers import available_dtype
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.model.prefix import PREFIX_PATH, with_prefix
from paligemma_jax.model.soft_prompt import with_soft_prompt
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.quantization.modules import quantize_modules
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.devices import choose_attention
from paligemma_jax.sharding.mesh import resolve_mesh
from paligemma_jax.sharding.rules import shardings

DTYPES = ("float32", "bfloat16", "float16", "float64")


class _SameKey(nnx.Rngs):
    """The same key for every parameter, for models of shapes.

    Counting keys, as `nnx.Rngs` does, reads the sharding of a traced array. JAX answers with an
    error message that it searches the trace for, which takes most of the time for a deep model.
    """

    def params(self) -> Array:
        return jax.random.key(0)


def abstract_model(
    config: PaliGemmaConfig,
    formats: Mapping[str, WeightFormat] = MappingProxyType({}),
    dtype: str = "float32",
) -> PaliGemma:
    """Return a model with shapes in place of arrays, which takes no memory.

    Args:
        formats: The format of each quantized module, by its path.
        dtype: Dtype of the parameters that are not quantized.
    """
    model = nnx.eval_shape(lambda: PaliGemma(config, _SameKey(0)))
    shapes = {path: leaf.shape for path, leaf in parameters(model).items()}
    model = with_parameters(model, lambda path: jax.ShapeDtypeStruct(shapes[path], dtype))
    return jax.eval_shape(partial(quantize_modules, formats=formats), model) if formats else model


def load_model(
    source: CheckpointSource | str | Path,
    dtype: str | None = None,
    numerics: str | None = None,
    mesh: Mesh | str | None = None,
    keep_float32: Callable[[str], bool] = lambda path: False,
    quantize: str | None = None,
    attention: str | None = None,
) -> PaliGemma:
    """Load a model from a Hugging Face directory, a converted checkpoint, a big_vision .npz file of
    a published variant, a LoRA adapter, or a run of `finetune`.

    An adapter is merged into the weights, or attached beside them if some are quantized.

    Args:
        source: The checkpoint, or a reference to it (see `resolve`).
        dtype: Dtype of parameters and activations, one of `DTYPES`. Default: the checkpoint's; on a
            CPU float32, where bfloat16 is slower (43 ms against 3 ms in a 2304 x 9216 product).
            float64 is a reference for the others: it needs JAX's 64-bit mode, plain attention and
            weights that are neither quantized nor adapted.
        numerics: A profile of `NUMERICS`. Default: the checkpoint's.
        mesh: Devices to load onto (see `paligemma_jax.sharding.mesh.resolve_mesh`). Only the slices
            of this process's devices are read.
        keep_float32: Selects the parameters, by path, that stay in float32 regardless of `dtype`.
            For training.
        quantize: What to quantize to 8 or 4 bits (see `Quantization`). Matrices are quantized while
            they are read, some rows at a time.
        attention: "fused" (no scores in memory, on TPUs and GPUs) or "plain". Default: the fastest.

    Raises:
        ValueError: The checkpoint is incomplete or damaged, or an argument is invalid.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    form, quantization = choose_attention(attention), Quantization.parse(quantize)
    source = resolve(source)
    checkpoint, adapter = source.checkpoint.with_numerics(numerics), source.delta
    if dtype == "float64":
        check_float64(source, attention, quantize)
        form = "plain"
    if adapter is not None:
        checkpoint = replace_parameters(checkpoint, adapter)
    checkpoint = quantize_checkpoint(checkpoint, quantization)
    for note in checkpoint.notes:
        warnings.warn(f"{source.reference}: {note}", stacklevel=2)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype
    config = replace(checkpoint.config, dtype=dtype, cache=quantization.cache, attention=form)
    mesh = resolve_mesh(mesh, config)
    model = read_model(checkpoint, config, mesh, keep_float32)
    if adapter is None:
        return model
    model = lora.attach_lora(model, adapter.factors)
    model = model if checkpoint.formats else lora.merge_lora(model)
    if adapter.soft_prompt is not None:
        dtype = "float32" if keep_float32(SOFT_PROMPT) else config.dtype
        model = with_soft_prompt(model, adapter.soft_prompt.astype(dtype))
    if adapter.prefix is not None:
        dtype = "float32" if keep_float32(PREFIX_PATH) else config.dtype
        model = with_prefix(model, adapter.prefix.astype(dtype))
    return distribute(model, mesh)


def check_float64(
    source: CheckpointSource, attention: str | None = None, quantize: str | None = None
) -> None:
    """Raise ValueError if a checkpoint cannot be loaded in float64 with these options."""
    available_dtype("float64")
    if attention == "fused":
        raise ValueError("attention must be plain with dtype float64, got fused")
    if quantize or source.checkpoint.formats:
        raise ValueError("dtype float64 needs weights that are not quantized: use float32")
    if source.delta is not None:
        raise ValueError(
            f"dtype float64 needs a full checkpoint, got the adapter {source.reference}: "
            "merge it first with paligemma-jax convert"
        )


def read_model(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    mesh: Mesh | None = None,
    keep_float32: Callable[[str], bool] = lambda path: False,
) -> PaliGemma:
    """Read the tensors of an open checkpoint into a model with this config, in its dtype."""
    model = abstract_model(config, checkpoint.formats)
    placement = shardings(parameters(model), mesh) if mesh else {}
    codes, arrays = checkpoint.parts, {}
    for path, tensor in checkpoint.tensors.items():
        if path not in codes:
            tensor = tensor.cast("float32" if keep_float32(path) else config.dtype)
        arrays[path] = _put(tensor, placement.get(path))
    return with_parameters(model, arrays.pop)


def _put(tensor: Tensor, sharding: NamedSharding | None) -> jax.Array:
    """Put a tensor on its devices. A slice that several devices share is read once, and only one
    slice at a time is in host memory."""
    if sharding is None:
        return jnp.asarray(tensor.load())
    slices = sharding.addressable_devices_indices_map(tensor.shape)
    groups = defaultdict(list)
    for device, index in slices.items():
        groups[str(index)].append(device)
    shards = {}
    for devices in groups.values():
        array = tensor.load(slices[devices[0]] or ())
        shards |= {device: jax.device_put(array, device) for device in devices}
    ordered = [shards[device] for device in slices]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, ordered)
