"""Regular expressions that select parameters and modules by their paths."""

from __future__ import annotations

import re
from collections.abc import Mapping

from paligemma_jax.model.tree import Leaf

MAX_LAYERS = 64  # of a tower
LAYER = r"(.*/layers/)(\d+/)?(.*)"
FLAGS = r"\(\?[aimsux]+\)"  # of the complete expression, at its start


def matches(pattern: str, path: str, value: Leaf = None) -> bool:
    """Whether a regular expression matches the path of a parameter or module.

    A pattern may leave out the number of the layer. A stacked path has no number, and a pattern may
    give one all the same, so both forms of a model select the same parameters.

    Args:
        value: An array at that path, whose leading axis is the layers where they are stacked.
            Without it, one layer is enough.

    Raises:
        ValueError: The pattern matches only some layers of a stack.
    """
    numbered = re.fullmatch(LAYER, path)
    if numbered is None:
        return bool(re.fullmatch(pattern, path))
    start, number, end = numbered.groups()
    depth = MAX_LAYERS if number or value is None else (*value.shape, 0)[0]
    chosen = [i for i in range(depth) if re.fullmatch(pattern, f"{start}{i}/{end}")]
    if number:
        if chosen:
            return int(number[:-1]) in chosen
    elif value is not None and 0 < len(chosen) < depth:
        layers = ", ".join(map(str, chosen))
        raise ValueError(
            f"{pattern} must match all {depth} layers of {path}, which are stacked, or none, got "
            f"layers {layers}: add --layers list"
        )
    return bool(chosen) or bool(re.fullmatch(pattern, start + end))


def unmatched(pattern: str, values: Mapping[str, Leaf]) -> list[str]:
    """The alternatives of a regular expression that match nothing, with or without the number of
    a layer.

    Args:
        values: Arrays by path, of parameters or modules.
    """
    names: set[str] = set(values)
    for path, value in values.items():
        in_layer = re.fullmatch(LAYER, path)
        if in_layer is not None:
            start, number, end = in_layer.groups()
            names.add(start + end)
            names |= {f"{start}{i}/{end}" for i in range(0 if number else (*value.shape, 0)[0])}
    return [part for part in alternatives(pattern) if not any(re.fullmatch(part, x) for x in names)]


def alternatives(pattern: str) -> list[str]:
    """Split a regular expression at each "|" that is not inside a group, a class or an escape.

    An expression that cannot be split, because a part refers to a group of another, stays whole.
    """
    flags = re.match(FLAGS, pattern)
    parts, depth = [""], 0
    for token in re.findall(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|.", pattern, re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            parts.append(flags[0] if flags else "")
        else:
            parts[-1] += token
    try:
        for part in parts:
            re.compile(part)
    except re.error:
        return [pattern]
    return parts
