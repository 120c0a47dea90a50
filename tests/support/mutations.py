"""JSON with every value replaced by values of other types, as a test of readers of such files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TypeVar

DEEP = "[" * 1000 + "]" * 1000
OTHERS = ["null", "true", "-1", "0.5", "1e308", "1e999", "1" * 30, "NaN", '"x"', '""', "[]", "[0]"]
OTHERS += ['["x"]', "{}", '{"x": 0}', "[[[0]]]", DEEP, r'"\ud800"', "1" * 5000]
MARK = "\0"
LONG, FEW = 40, 6

Key = TypeVar("Key")


def mutations(value: object) -> Iterator[str]:
    """Yield JSON texts: `value` with each of its parts, and itself, replaced by each of OTHERS."""
    for marked in _marked(value):
        text = json.dumps(marked)
        yield from (text.replace(json.dumps(MARK), other) for other in OTHERS)


def omissions(value: object) -> Iterator[str]:
    """Yield JSON texts: `value` without one of the keys of its objects."""
    for marked in _marked(value):
        kept = _without_mark(marked)
        if kept != marked:
            yield json.dumps(kept)


def _marked(value: object) -> Iterator[object]:
    """Copies of `value` with one part replaced by MARK. Of long lists and objects, only the first
    parts are replaced."""
    yield MARK
    if isinstance(value, dict):
        for key, part in _first(value.items()):
            yield from (value | {key: marked} for marked in _marked(part))
    if isinstance(value, list):
        for i, part in _first(enumerate(value)):
            yield from ([*value[:i], marked, *value[i + 1 :]] for marked in _marked(part))


def _first(parts: Iterable[tuple[Key, object]]) -> list[tuple[Key, object]]:
    listed = list(parts)
    return listed if len(listed) <= LONG else listed[:FEW]


def _without_mark(value: object) -> object:
    """`value` without the keys whose value is MARK."""
    if isinstance(value, dict):
        return {key: _without_mark(part) for key, part in value.items() if part != MARK}
    return [_without_mark(part) for part in value] if isinstance(value, list) else value
