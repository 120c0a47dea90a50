"""Decode JSON that comes from outside into typed values.

The one place through which every JSON file passes, a line of JSONL and the JSON inside a
safetensors file included. A type is a `msgspec.Struct`, or anything that msgspec decodes; it states
the fields that are read, and others are ignored. Size, depth and range are bounded, and every error
is one line: the file, the line, the field, what was expected and what was found.

Never join a type with bounds to a tuple of fixed length in a union, as in
`Annotated[float, Meta(ge=0)] | tuple[float, float]`: msgspec 0.22 reads the wrong memory. A list
with min_length and max_length works.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

Value = TypeVar("Value")
JsonObject = dict[str, Any]  # values of any JSON type, for files that are copied and edited

Count = Annotated[int, Meta(ge=0, lt=2**48)]  # a size, an offset, or a number of anything
Positive = Annotated[int, Meta(ge=1, lt=2**31)]  # a width, a depth, a length
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]

JSON_LIMIT = 2**24  # bytes; the header and index of a 28b model have 0.2 MB
MAX_DEPTH = 64  # of objects and arrays that are decoded without a type

_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "object": "an object",
    "array": "an array",
    "null": "null",
}


def load_json(file: Path, kind: type[Value] = JsonObject, limit: int = JSON_LIMIT) -> Value:
    """Decode a JSON file of at most `limit` bytes.

    Raises:
        ValueError: The file is missing, too large, not JSON, or not of type `kind`.
    """
    try:
        size = file.stat().st_size
        if size > limit:
            raise ValueError(f"{file} must have at most {limit} bytes, got {size}")
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except OSError as error:
        raise ValueError(f"{file} is not readable: {error.strerror}") from None
    return decode(content, kind, str(file))


def decode(content: bytes, kind: type[Value] = JsonObject, source: str = "") -> Value:
    """Decode JSON. A byte order mark is skipped.

    Args:
        content: UTF-8.
        kind: The type of the result.
        source: The file, or the file and the line, for the error.

    Raises:
        ValueError: The content is not JSON, or not of type `kind`.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        value = msgspec.json.decode(content, type=kind)
        if kind in (JsonObject, object):
            _check_depth(value)
        return value
    except msgspec.ValidationError as error:
        reason = _explain(str(error), content)
    except msgspec.DecodeError as error:
        reason = f"not readable JSON ({_locate(str(error), content)})"
    except UnicodeDecodeError as error:
        reason = f"not readable JSON (not UTF-8 at byte {error.start})"
    except RecursionError:
        reason = f"not readable JSON (nested more than {MAX_DEPTH} levels deep)"
    raise ValueError(f"{source}: {reason}" if source else reason)


def check(value: object, kind: type[Value], source: str = "", strict: bool = True) -> Value:
    """Convert a Python value, such as a row of a data set, as `decode` does its JSON.

    Args:
        strict: If False, a text may be a number, as in XML.

    Raises:
        ValueError: The value is not of type `kind`.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        reason = _explain(str(error), value)
    except RecursionError:
        reason = f"nested more than {MAX_DEPTH} levels deep"
    raise ValueError(f"{source}: {reason}" if source else reason)


def describe(value: object) -> str:
    """Describe a JSON value in an error, in at most about 60 characters."""
    if isinstance(value, dict | list | tuple):
        kind, items = ("an object", "key") if isinstance(value, dict) else ("an array", "item")
        return f"{kind} of {len(value)} {items}{'' if len(value) == 1 else 's'}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(value[:100] if isinstance(value, str | bytes) else value).split())
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [x for item in nested for x in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise RecursionError


def _locate(message: str, content: bytes) -> str:
    """The message of a syntax error, with the line in place of the byte."""
    position = re.search(r" \(byte (\d+)\)$", message)
    if position is None:
        surrogate = re.search(rb"\\u[dD][89a-fA-F]..", content)  # msgspec calls it "truncated"
        if surrogate:
            return f"{surrogate[0].decode(errors='replace')} is half of a surrogate pair"
        return message[0].lower() + message[1:]
    at = int(position[1])
    reason = message[: position.start()].removeprefix("JSON is malformed: ")
    if content[at : at + 9].lstrip(b"-").startswith((b"NaN", b"Infinity")):
        reason = "NaN and Infinity are not JSON"
    line, column = content.count(b"\n", 0, at) + 1, at - content.rfind(b"\n", 0, at)
    where = f"line {line} column {column}" if b"\n" in content.strip() else f"column {column}"
    return f"{reason}, {where}"


def _explain(message: str, value: object) -> str:
    """Turn the message of a `ValidationError` into "X must be ..., got ..."."""
    message, _, path = message.partition(" - at `$")
    path = path.removesuffix("`")
    field = re.sub(r"\[\.\.\.\]", "[*]", path.lstrip(".")) or "the content"
    missing = re.fullmatch(r"Object missing required field `(.+)`", message)
    if missing:
        return f"{path.lstrip('.')}.{missing[1]} is missing".lstrip(".")
    found = _at(value, path)
    got = found and f", got {found}"
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", message, re.DOTALL)
    if unknown:
        return f"{field} has an unknown field `{unknown[1]}`"
    expected = re.fullmatch(r"Expected `([^`]+)`(, got `(\w+)`)?(.*)", message)
    if expected is None:  # "Invalid enum value 'x'", "Number out of range"
        return f"{field}: {message[0].lower()}{message[1:]}{got}"
    names = " or ".join(_NAMES.get(name, name) for name in expected[1].split(" | "))
    bound = re.sub(r", got \d+$", "", expected[4])
    bound = bound.replace(" >= ", " of at least ").replace(" <= ", " of at most ")
    bound = bound.replace(" > ", " above ").replace(" < ", " below ")
    if not got and expected[3]:
        got = f", got {_NAMES.get(expected[3], expected[3])}"
    return f"{field} must be {names}{bound}{got}"


def _at(value: object, path: str) -> str:
    """Describe what is at a path such as ".layers[2].name", if it can be found."""
    try:
        if isinstance(value, bytes):
            value = msgspec.json.decode(value)
        for name, index in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path):
            value = value[name] if name else value[int(index)]  # type: ignore[index]
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, RecursionError):
        return ""
    return describe(value)
