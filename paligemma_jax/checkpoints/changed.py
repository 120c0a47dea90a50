"""Save and load models with modules of your own.

    DIR/changed.json         version, config, dtype, whether layers are stacked, and the class of
                             each module that is not of this project or of flax, by its path
    DIR/model.safetensors    parameters by path
    DIR/huggingface/         tokenizer and processor files

No class is imported by a name in a checkpoint: the caller builds the model, and the file says which
classes that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import msgspec
from flax import nnx
from jax import Array
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from convert.config import config_from_json, config_to_json
from convert.files import atomic_output, companion_files, copy_files, json_bytes, user_path
from convert.typed_json import JsonObject, load_json
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.decoder import Decoder
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import modules, parameters, with_parameters
from paligemma_jax.sharding.arrays import to_host

DESCRIPTION, WEIGHTS, FILES, VERSION = "changed.json", "model.safetensors", "huggingface", 1
Build = Callable[[PaliGemma], nnx.Module]


class _Description(msgspec.Struct):
    """changed.json."""

    version: int
    config: JsonObject
    dtype: str
    classes: dict[str, str] = {}
    stacked: bool = False


def save_changed(
    directory: str | Path,
    model: nnx.Module,
    base: PaliGemmaConfig,
    like: CheckpointSource | str | Path | None = None,
    force: bool = False,
) -> None:
    """Write a model of any modules.

    Args:
        directory: Where to write; the checkpoint appears there when it is complete.
        base: The config of the PaliGemma that the model was made from.
        like: A checkpoint whose tokenizer and processor files are copied.
        force: Replace what is in `directory`.
    """
    arrays = {path: jnp.asarray(to_host(x)) for path, x in parameters(model).items()}
    description = {
        "version": VERSION,
        "config": config_to_json(base, base.dtype),
        "dtype": base.dtype,
        "classes": own_classes(model),
        "stacked": _is_stacked(model),
    }
    files = companion_files(resolve(like).tokenizer_dir) if like else {}
    with atomic_output(user_path(directory), force) as new:
        (new / FILES).mkdir(parents=True)
        save_file(arrays, new / WEIGHTS)
        copy_files(new / FILES, files)
        (new / DESCRIPTION).write_bytes(json_bytes(description))


def load_changed(directory: str | Path, build: Build) -> nnx.Module:
    """Load what `save_changed` wrote.

    Args:
        build: Makes the model from a PaliGemma of the saved config, as it was made before it was
            saved. Its arrays are replaced by the saved ones. The layers of that PaliGemma are
            stacked if those of the saved model are.

    Raises:
        ValueError: The files are damaged; or the model that `build` makes has other classes, or
            parameters of other names, shapes or dtypes than the saved one.
    """
    directory = user_path(directory)
    description = load_json(directory / DESCRIPTION, _Description)
    if description.version != VERSION:
        raise ValueError(
            f"{directory / DESCRIPTION} must have version {VERSION}, got {description.version}"
        )
    config = replace(config_from_json(description.config), dtype=description.dtype)

    def make() -> nnx.Module:
        base = PaliGemma(config, nnx.Rngs(0))
        return build(stack_model(base, delete=False) if description.stacked else base)

    model = nnx.eval_shape(make)
    _check_classes(directory, description.classes, own_classes(model))
    arrays = _read(directory / WEIGHTS)
    expected = parameters(model)
    wrong = [
        f"{path} must be {list(leaf.shape)}, got {list(arrays[path].shape)}"
        for path, leaf in expected.items()
        if path in arrays and arrays[path].shape != leaf.shape
    ]
    wrong += [f"{path} is missing" for path in expected.keys() - arrays.keys()]
    wrong += [f"{path} is not in the model" for path in arrays.keys() - expected.keys()]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{directory} does not fit the model that build makes: {'; '.join(wrong[:3])}{more}"
        )
    return with_parameters(model, arrays.__getitem__)


def _is_stacked(model: nnx.Module) -> bool:
    decoders = modules(model, Decoder).values()
    return any(not isinstance(decoder.layers, nnx.List) for decoder in decoders)


def own_classes(model: nnx.Module) -> dict[str, str]:
    """The class of each module that is not of this project or of flax, by its path; "" is the
    model itself."""
    found = {"": model, **_inside(model)}
    return {
        path: f"{type(module).__module__}.{type(module).__qualname__}"
        for path, module in found.items()
        if not type(module).__module__.startswith(("paligemma_jax.", "flax."))
    }


def _inside(module: nnx.Module, prefix: str = "") -> dict[str, nnx.Module]:
    """Every module by its path, those inside others too."""
    found = {}
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, child in children:
        if isinstance(child, nnx.Module):
            found[f"{prefix}{name}"] = child
            found |= _inside(child, f"{prefix}{name}/")
    return found


def _check_classes(directory: Path, saved: dict[str, str], built: dict[str, str]) -> None:
    """Compare names without their modules: a script may have moved."""
    names = [{path: name.rpartition(".")[2] for path, name in c.items()} for c in (saved, built)]
    for path in sorted(names[0].keys() | names[1].keys()):
        if names[0].get(path) != names[1].get(path):
            where = path or "the model itself"
            raise ValueError(
                f"{directory} has {saved.get(path, 'a class of this project')} for {where}, but "
                f"build makes {built.get(path, 'a class of this project')}: "
                "pass the function that made the saved model"
            )


def _read(file: Path) -> dict[str, Array]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
