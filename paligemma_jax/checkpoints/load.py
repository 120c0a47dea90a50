"""Checkpoints to models: finds a source, reads it tensor by tensor, puts each where it belongs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from convert import formats, peft
from convert.quantized import quantize_checkpoint
from convert.tensor import Tensor
from paligemma_jax import lora
from paligemma_jax.checkpoints.source import under
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.quantization.quantize import quantize_modules
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.mesh import resolve_mesh
from paligemma_jax.sharding.rules import shardings

DTYPES = ("float32", "bfloat16", "float16")




def abstract_model(config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes in the place of arrays: costs nothing, whatever its size."""
    return nnx.eval_shape(lambda: PaliGemma(config, nnx.Rngs(0)))










def load_model(
    source: Path,
    dtype: str | None = None,
    numerics: str | None = None,
    mesh: Mesh | str | None = None,
    wide: Callable[[str], bool] = lambda path: False,
    quantize: str | None = None,
) -> PaliGemma:
    """The model of a checkpoint: a Hugging Face directory, one of this project's own, a big_vision .npz of a published variant, or a LoRA adapter.

    dtype: of parameters and activations, one of DTYPES. By default the checkpoint's own; on a CPU float32, where bfloat16 is slower
    (43 ms for 3 ms in a 2304 x 9216 product).  numerics: by default what the checkpoint means.
    mesh: where to put the parameters (`paligemma_jax.sharding.mesh.resolve_mesh`); each device is given its slices, and only they are read.
    wide: the paths of the parameters to hold in float32 whatever `dtype` is: those that learn.
    quantize: what to hold in 8 or 4 bits (`Quantization.of`); each matrix is made smaller while it is read, some rows at a time.
    An adapter is merged into the model, or laid beside its products where some are quantized.
    ValueError if the source is not a whole PaliGemma checkpoint.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    how = Quantization.parse(quantize)
    checkpoint = quantize_checkpoint(formats.read(under(source)).with_numerics(numerics), how)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype)
    for note in checkpoint.notes:
        warnings.warn(f"{source}: {note}", stacklevel=2)
    model = abstract_model(replace(checkpoint.config, dtype=dtype, cache=how.cache))
    model = jax.eval_shape(partial(quantize_modules, formats=checkpoint.formats), model) if checkpoint.formats else model
    mesh = resolve_mesh(mesh, checkpoint.config)
    places = shardings(parameters(model), mesh) if mesh else {}
    parts, arrays = checkpoint.parts, {}
    for path, tensor in checkpoint.tensors.items():
        arrays[path] = _put(tensor if path in parts else tensor.cast("float32" if wide(path) else dtype), places.get(path))
    model = with_parameters(model, arrays.pop)
    if not peft.is_adapter(source):
        return model
    model = lora.attach_lora(model, peft.read_adapter(source, model.config))
    return distribute(model if checkpoint.formats else lora.merge_lora(model), mesh)






def _put(tensor: Tensor, sharding: NamedSharding | None) -> jax.Array:
    """The tensor on its devices; what several of them hold is read once, and one slice at a time is on the host."""
    if sharding is None:
        return jnp.asarray(tensor.load())
    devices: dict[str, list] = {}
    places = sharding.addressable_devices_indices_map(tensor.shape)
    for device, index in places.items():
        devices.setdefault(str(index), []).append((device, index))
    parts = {}
    for group in devices.values():
        array = tensor.load(group[0][1] or ())
        parts |= {device: jax.device_put(array, device) for device, _ in group}
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, [parts[device] for device in places])


