"""JSON with every value replaced by values of other types, as a test of readers of such files."""

from __future__ import annotations

import json
from collections.abc import Iterator

DEEP = "[" * 1000 + "]" * 1000
OTHERS = ["null", "true", "-1", "0.5", "1e308", "1e999", "1" * 30, "NaN", '"x"', '""', "[]", "[0]"]
OTHERS += ['["x"]', "{}", '{"x": 0}', "[[[0]]]", DEEP, r'"\ud800"', "1" * 5000]
MARK = "\0"


def mutations(value: object) -> Iterator[str]:
    """Yield JSON texts: `value` with each of its parts, and itself, replaced by each of OTHERS."""
    for marked in _marked(value):
        text = json.dumps(marked)
        yield from (text.replace(json.dumps(MARK), other) for other in OTHERS)


def _marked(value: object) -> Iterator[object]:
    """Copies of `value` with one part replaced by MARK."""
    yield MARK
    if isinstance(value, dict):
        for key, part in value.items():
            yield from (value | {key: marked} for marked in _marked(part))
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from ([*value[:i], marked, *value[i + 1 :]] for marked in _marked(part))
