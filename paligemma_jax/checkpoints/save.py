"""."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax

from convert import formats, orbax
from convert.checkpoint import Checkpoint
from convert.files import companions
from convert.tensor import Tensor, from_array
from paligemma_jax.checkpoints.source import files, resolve
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization.quantize import weight_formats
from paligemma_jax.sharding import hosts


def save_model(directory: Path, model: PaliGemma, like: str | Path | None = None, to: str = "jax", force: bool = False) -> None:
    """Writes a model, stacked or not, as "jax" (this project's own), "huggingface" or "big_vision", in the dtype of its parameters.

    like: the checkpoint that it was trained from, whose tokenizer and processor files come along. ValueError as in `convert.write`.
    Several processes write together, each its shards.
    """
    if jax.process_count() > 1:
        return _save_together(directory, model, like, to)
    tensors: dict[str, Tensor] = {}
    for path, array in parameters(model).items():
        if re.match(r"\w+/layers/\d|(?!\w+/layers/)", path):
            tensors[path] = from_array(array)
        else:  # what `stack` made
            tensors |= {path.replace("/layers/", f"/layers/{i}/"): from_array(array, (i,)) for i in range(array.shape[0])}
    config = replace(model.config, dtype=tensors.get("decoder/embedder/table", tensors["decoder/norm/scale"]).dtype.name)
    came_along = companions(files(resolve(like))) if like else {}
    checkpoint = Checkpoint("jax", config, tensors, came_along, formats=weight_formats(model))
    formats.write(formats.with_changes(checkpoint, to), directory, to, force=force)


def _save_together(directory: Path, model: PaliGemma, like: str | Path | None, to: str) -> None:
    """As "jax", by Orbax; the first process describes it, and converts it where it shall be another format."""
    import orbax.checkpoint as ocp

    tree: dict = {}
    for path, array in parameters(model).items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    new = directory.with_name(f".{directory.name}.new")
    if hosts.is_first_process():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    hosts.barrier("save")
    with ocp.StandardCheckpointer() as writer:
        writer.save(new.resolve() / orbax.PARAMS, tree)
    if hosts.is_first_process():
        config = replace(model.config, dtype=tree["decoder"]["norm"]["scale"].dtype.name)
        came_along = companions(files(resolve(like))) if like else {}
        orbax.describe(new, Checkpoint("jax", config, {}, came_along, formats=weight_formats(model)))
        formats.convert(new, directory, to, force=True)
        shutil.rmtree(new)
    hosts.barrier("saved")
