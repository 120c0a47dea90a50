"""Matches the tensors of a file with the rows of a table (`convert.table`): which fills which parameter, and all that is wrong, told at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from convert.layout import axis_sizes, layout_shape
from convert.table import WeightRow
from convert.tensor import Tensor, part, relayout
from paligemma_jax.model.config import PaliGemmaConfig


class Entry(NamedTuple):
    """A tensor as its file describes it, its dtype as the file spells it."""

    dtype: str
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]


class Piece(NamedTuple):
    """One parameter and its place in a file: `key`, or the part of `key` at `position`."""

    key: str
    position: tuple[int, ...]
    layout: str
    path: str
    target: str
    sizes: dict[str, int]

    def here(self, tensor: Tensor) -> Tensor:
        """The parameter, of the tensor in the file."""
        return relayout(part(tensor, self.position) if self.position else tensor, self.layout, self.target, self.sizes)

    def there(self, tensor: Tensor) -> Tensor:
        """What the file holds of the parameter."""
        return relayout(tensor, self.target, self.layout, self.sizes)


def pieces(table: Iterable[WeightRow], config: PaliGemmaConfig) -> list[Piece]:
    """The rows of a table for a model of this config, layer by layer: "kv_einsum/w[*,0]" has key "kv_einsum/w", position (layer, 0)."""
    found = []
    for name, layout, path, target in table:
        key, _, position = name.rstrip("]").partition("[")
        depth = config.vision.num_hidden_layers if path.startswith("vision") else config.decoder.num_hidden_layers
        for layer in range(depth if "*" in path else 1):
            of_layer, place = lambda text, layer=layer: text.replace("*", str(layer)), position.replace("*", str(layer))
            index = tuple(int(i) for i in place.split(",") if i)
            found.append(Piece(of_layer(key), index, layout, of_layer(path), target, axis_sizes(config, path)))
    return found


def shapes(found: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """key -> the shape of the whole tensor in the file."""
    result: dict[str, tuple[int, ...]] = {}
    for piece in found:
        whole = (*(i + 1 for i in piece.position), *layout_shape(piece.layout, piece.sizes))
        result[piece.key] = tuple(map(max, whole, result.get(piece.key, whole)))
    return result


def match(
    entries: Mapping[str, Entry],
    found: list[Piece],
    dtypes: Iterable[str],
    where: object,
    described: str,
    name: Callable[[str], str] = str,
    ignored: Iterable[str] = (),
) -> dict[str, Tensor]:
    """parameter path -> Tensor, in the order of `entries`.

    dtypes: those that can be read.  where, described: the file and what its config was read from, for the error.
    name: a key in the spelling of the table.  ignored: patterns of keys that fill nothing.
    ValueError listing every missing, unknown, doubled and mis-shaped tensor.
    """
    expected, by_name, wrong = shapes(found), {}, []
    for key, entry in entries.items():
        known = name(key)
        if known not in expected:
            if not any(re.fullmatch(pattern, known) for pattern in ignored):
                wrong.append(f"unknown key {key}")
            continue
        if entry.shape != expected[known]:
            wrong.append(f"{key} has shape {list(entry.shape)}, {described} asks for {list(expected[known])}")
        if entry.dtype not in dtypes:
            wrong.append(f"{key} has dtype {entry.dtype}; known are {', '.join(dtypes)}")
        if known in by_name:
            wrong.append(f"{key} and {by_name[known][0]} are the same tensor")
        by_name[known] = (key, entry)
    wrong += [f"missing {key}" for key in expected if key not in by_name]
    if wrong:
        first = f"{where} does not hold the weights that {described} describes{foreign(by_name, expected)} ({len(wrong)} faults):"
        raise ValueError("\n  ".join([first, *_grouped(wrong)]))
    whole = {key: entry.tensor() for key, (_, entry) in by_name.items()}
    order = {key: i for i, key in enumerate(by_name)}
    return {piece.path: piece.here(whole[piece.key]) for piece in sorted(found, key=lambda piece: order[piece.key])}


def _grouped(faults: Iterable[str]) -> list[str]:
    """The same fault in every layer is one line."""
    alike: dict[str, list[str]] = {}
    for fault in faults:
        alike.setdefault(re.sub(r"\d+", "*", fault), []).append(fault)
    return [first + f" (and {len(rest)} more like this)" * bool(rest) for first, *rest in alike.values()]


def alike(paths: Iterable[str]) -> list[str]:
    """The paths, each once, with a * for the layer."""
    return list(dict.fromkeys(re.sub(r"/layers/\d+/", "/layers/*/", path) for path in paths))


def foreign(found: Iterable[str], expected: Iterable[str]) -> str:
    """What a checkpoint with the keys `found` seems to be instead, if it has nothing of one tower."""
    vision = {key for key in expected if key.startswith(("vision_tower", "img/", "vision/"))}
    seen = set(found)
    if not seen & set(expected):
        return ": none of its tensors is a PaliGemma's"
    if not seen & vision:
        return ": it has no image encoder, so it is a text-only model (a Gemma?)"
    return "" if seen & (set(expected) - vision) else ": it has no decoder, so it is an image encoder alone (a SigLIP?)"
