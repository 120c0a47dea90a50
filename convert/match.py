"""Match the tensors of a file with the parameters of a model; report all mismatches at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from convert.layout import axis_sizes, layout_shape
from convert.table import HEAD_PATH, HUGGINGFACE, WeightRow
from convert.tensor import Tensor, relayout, select
from paligemma_jax.model.config import PaliGemmaConfig


class TensorEntry(NamedTuple):
    """A tensor as its file describes it."""

    dtype: str  # as the file spells it
    shape: tuple[int, ...]
    open: Callable[[], Tensor]


class Weight(NamedTuple):
    """One parameter of a model, and where a file has it: in the tensor `key`, or a slice of it."""

    key: str
    position: tuple[int, ...]
    file_layout: str
    path: str
    model_layout: str
    sizes: dict[str, int]  # of the axis letters

    @property
    def file_shape(self) -> tuple[int, ...]:
        return layout_shape(self.file_layout, self.sizes)

    @property
    def model_shape(self) -> tuple[int, ...]:
        return layout_shape(self.model_layout, self.sizes)

    def from_file(self, tensor: Tensor) -> Tensor:
        """The parameter, from the tensor of the file."""
        sliced = select(tensor, self.position)
        return relayout(sliced, self.file_layout, self.model_layout, self.sizes)

    def to_file(self, tensor: Tensor) -> Tensor:
        """The tensor of the file (or its slice), from the parameter."""
        return relayout(tensor, self.model_layout, self.file_layout, self.sizes)


def weights(rows: Iterable[WeightRow], config: PaliGemmaConfig) -> list[Weight]:
    """The rows of a table for every layer of a model: "kv_einsum/w[*,0]" has the key "kv_einsum/w"
    and the position (layer, 0). The row of the head is left out if it is tied to the table."""
    result = []
    for row in rows:
        if row.path == HEAD_PATH and config.decoder.tie_word_embeddings:
            continue
        key, _, position = row.key.rstrip("]").partition("[")
        tower = config.vision if row.path.startswith("vision") else config.decoder
        sizes = axis_sizes(config, row.path)
        for layer in map(str, range(tower.num_hidden_layers if "*" in row.path else 1)):
            index = tuple(int(i) for i in position.replace("*", layer).split(",") if i)
            path = row.path.replace("*", layer)
            layouts = (row.file_layout, path, row.model_layout)
            result.append(Weight(key.replace("*", layer), index, *layouts, sizes))
    return result


def huggingface_weights(config: PaliGemmaConfig) -> list[Weight]:
    """Every parameter, under its name in the released Hugging Face checkpoints."""
    return weights(HUGGINGFACE[config.decoder.model_type], config)


def file_shapes(weights: Iterable[Weight]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        shape = (*(i + 1 for i in weight.position), *weight.file_shape)
        shapes[weight.key] = tuple(map(max, shape, shapes.get(weight.key, shape)))
    return shapes


def match(
    entries: Mapping[str, TensorEntry],
    weights: list[Weight],
    *,
    dtypes: Iterable[str],
    source: object,
    config_name: str,
    canonical_name: Callable[[str], str] = str,
    ignored: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return every parameter by path, in the order of `entries`.

    Args:
        entries: The tensors of a file by key.
        weights: The parameters that the model needs.
        dtypes: The supported dtypes, as the file spells them.
        source, config_name: The file and the origin of its config, for the error.
        canonical_name: Maps a key to the spelling of `weights`.
        ignored: Regular expressions of keys without a parameter.

    Raises:
        ValueError: Lists missing, unknown and duplicate tensors, and wrong shapes and dtypes.
    """
    shapes, keys, errors = file_shapes(weights), {}, []
    for key, entry in entries.items():
        name = canonical_name(key)
        if name not in shapes:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                errors.append(f"unknown key {key}")
            continue
        if entry.shape != shapes[name]:
            expected = f"{config_name} requires {list(shapes[name])}"
            errors.append(f"{key} has shape {list(entry.shape)}, but {expected}")
        if entry.dtype not in dtypes:
            errors.append(f"{key} has dtype {entry.dtype}, must be one of {', '.join(dtypes)}")
        if name in keys:
            errors.append(f"{key} and {keys[name]} are the same tensor")
        keys[name] = key
    errors += [f"missing {name}" for name in shapes if name not in keys]
    if errors:
        hint = describe_other_model(keys, shapes)
        first = f"{source} does not contain the weights that {config_name} describes{hint}"
        lines = [f"{first} (errors: {len(errors)}):", *_group_layers(errors)]
        raise ValueError("\n  ".join(lines))
    tensors = {name: entries[key].open() for name, key in keys.items()}
    order = {name: i for i, name in enumerate(keys)}
    ordered = sorted(weights, key=lambda weight: order[weight.key])
    return {weight.path: weight.from_file(tensors[weight.key]) for weight in ordered}


def _group_layers(errors: Iterable[str]) -> list[str]:
    """The errors, with one line for those that differ only in numbers."""
    groups: dict[str, list[str]] = {}
    for error in errors:
        groups.setdefault(re.sub(r"\d+", "*", error), []).append(error)
    return [
        f"{first} (and {len(rest)} more like this)" if rest else first
        for first, *rest in groups.values()
    ]


def collapse_layers(paths: Iterable[str]) -> list[str]:
    """The distinct paths, with * in place of layer numbers."""
    return list(dict.fromkeys(re.sub(r"/layers/\d+/", "/layers/*/", path) for path in paths))


def describe_other_model(keys: Iterable[str], expected: Iterable[str]) -> str:
    """Describe, for an error, a checkpoint with these keys if it lacks a tower."""
    prefixes = ("vision_tower", "img/", "vision/")
    vision, present = {key for key in expected if key.startswith(prefixes)}, set(keys)
    if not present & set(expected):
        return ": it contains no PaliGemma tensors"
    if not present & vision:
        return ": it has no image encoder, so it is a text-only model (a Gemma?)"
    if not present & (set(expected) - vision):
        return ": it has no decoder, so it is only an image encoder (a SigLIP?)"
    return ""
