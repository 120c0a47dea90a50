"""Save a model as a checkpoint of any format, from one or several processes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
from flax.traverse_util import unflatten_dict
from jax import Array

from convert import formats, orbax
from convert.checkpoint import Checkpoint
from convert.files import companion_files
from convert.quantized import check_complete
from convert.tensor import Tensor, from_array
from paligemma_jax import lora
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.prefix import prefix_of, soft_token_count
from paligemma_jax.model.tree import modules, parameters
from paligemma_jax.quantization.quantize import weight_formats
from paligemma_jax.sharding import hosts


def save_model(
    directory: Path,
    model: PaliGemma,
    like: CheckpointSource | str | Path | None = None,
    to: str = "jax",
    force: bool = False,
) -> None:
    """Write a model, stacked or not, in the dtype of its parameters.

    In a multi-process run, each process writes its own shards, and an existing `directory` is
    replaced.

    Args:
        directory: Where to write; the checkpoint appears there when it is complete.
        like: The checkpoint it was trained from, whose tokenizer and processor files are copied.
        to: The format: "jax" (this project's), "huggingface" or "big_vision".
        force: Replace what is in `directory`.

    Raises:
        ValueError: The parameters are not those that the model's config describes, or as in
            `convert.formats.write`.
    """
    if modules(model, lora.LoRALinear):
        raise ValueError(
            "the model must have no LoRA adapters: merge them (paligemma_jax.lora.merge_lora), or "
            "save them alone (convert.peft.save_adapter)"
        )
    if soft_token_count(model):
        kind = "soft prompt" if prefix_of(model) is None else "prefix"
        raise ValueError(
            f"the model must have no {kind}: save it as an adapter (convert.peft.save_adapter)"
        )
    arrays = parameters(model)
    dtype = arrays.get("decoder/embedder/table", arrays["decoder/norm/scale"]).dtype.name
    files = companion_files(resolve(like).tokenizer_dir) if like else {}
    config = replace(model.config, dtype=dtype)
    checkpoint = Checkpoint("jax", config, {}, files, formats=weight_formats(model))
    checkpoint = replace(checkpoint, tensors=_tensors(arrays))
    check_complete(checkpoint)
    if jax.process_count() > 1:
        return _save_together(directory, checkpoint, arrays, to)
    formats.write(formats.change(checkpoint, to), directory, to, force=force)


def _tensors(arrays: dict[str, Array]) -> dict[str, Tensor]:
    """Return the arrays as tensors, under the paths of an unstacked model."""
    tensors = {}
    for path, array in arrays.items():
        if re.match(r"\w+/layers/(?!\d)", path):  # stacked: the layers are the first axis
            for i in range(array.shape[0]):
                tensors[path.replace("/layers/", f"/layers/{i}/")] = from_array(array, (i,))
        else:
            tensors[path] = from_array(array)
    return tensors


def _save_together(
    directory: Path, checkpoint: Checkpoint, arrays: dict[str, Array], to: str
) -> None:
    """Save with Orbax. The first process adds the description, and converts to another format."""
    import orbax.checkpoint as ocp

    new = directory.with_name(f".{directory.name}.new")
    if hosts.is_first_process():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    hosts.barrier("save")
    with ocp.StandardCheckpointer() as writer:
        writer.save(new.resolve() / orbax.PARAMS, unflatten_dict(arrays, sep="/"))
    if hosts.is_first_process():
        orbax.describe(new, checkpoint)
        formats.convert(new, directory, to, force=True)
        shutil.rmtree(new)
    hosts.barrier("saved")
