"""Data out of a pickle file, without unpickling: RefCOCO's annotations are published in this form.

The operations (Python's pickletools lists them) are read as a list, and only those that make lists, dicts, tuples, texts and numbers are carried out;
nothing that a file names is imported or called.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
SCALARS = r"(INT|INT1|INT2|LONG|LONG1|LONG4|FLOAT|STRING|UNICODE|UNICODE8)$"
IGNORED = {"PROTO", "FRAME"}
MARK = object()


def read(data: bytes) -> Any:
    """ValueError if the file is damaged, or holds anything but plain data."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return stack.pop()
            if not _known(operation.name, argument, stack, memo):
                told = f"the pickle file does more than hold data ({operation.name}): it is not read"
                break
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        told = f"not a whole pickle file ({error})"
    raise ValueError(told)


def _known(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> bool:
    """Carries out one operation; False if it is none of those that make plain data."""
    if name == "MARK":
        stack.append(MARK)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in TUPLES:
        stack.append(tuple(_pop(stack, TUPLES[name])))
    elif name in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if name == "EMPTY_LIST" else {})
    elif name in ("LIST", "TUPLE", "DICT"):
        items = _marked(stack)
        stack.append({"LIST": list, "TUPLE": tuple, "DICT": _pairs}[name](items))
    elif name in ("APPEND", "APPENDS"):
        items = _pop(stack, 1) if name == "APPEND" else _marked(stack)
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _pop(stack, 2) if name == "SETITEM" else _marked(stack)
        stack[-1].update(_pairs(items))
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif re.search(SCALARS, name) and isinstance(argument, int | float | str):
        stack.append(argument)
    else:
        return name in IGNORED
    return True


def _pop(stack: list[Any], count: int) -> list[Any]:
    items = stack[len(stack) - count :]
    if len(items) < count or any(item is MARK for item in items):
        raise IndexError("too few items")
    del stack[len(stack) - count :]
    return items


def _marked(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - stack[::-1].index(MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2]))
