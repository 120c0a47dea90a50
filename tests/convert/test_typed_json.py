"""`convert.typed_json`: every error names the file, the field, what was expected and found."""

from __future__ import annotations

import pytest
from msgspec import Struct

from convert.typed_json import (
    MAX_DEPTH,
    Count,
    JsonObject,
    Positive,
    check,
    decode,
    describe,
    load_json,
)


class Inner(Struct):
    width: Positive
    rate: float | None = None
    sizes: dict[str, Count] = {}
    names: list[str] = []
    pair: tuple[int, int] = (0, 0)


class Outer(Struct):
    inner: Inner
    name: str = ""


BROKEN = {
    '{"inner": {"width": "3"}}': "f: inner.width must be an integer, got '3'",
    '{"inner": {"width": 0}}': "f: inner.width must be an integer of at least 1, got 0",
    '{"inner": {"width": 99999999999}}': "inner.width must be an integer of at most 2147483647",
    '{"inner": {"width": true}}': "inner.width must be an integer, got true",
    '{"inner": {"width": 3, "rate": []}}': "inner.rate must be a number or null, got an array of 0",
    '{"inner": {"width": 3, "rate": 1e999}}': "inner.rate: number out of range",
    '{"inner": {"width": 3, "rate": NaN}}': "NaN and Infinity are not JSON, column 32",
    '{"inner": {"width": 3, "sizes": {"a": -1}}}': "inner.sizes[*] must be an integer of at least",
    '{"inner": {"width": 3, "names": ["a", 2]}}': "inner.names[1] must be a string, got 2",
    '{"inner": {}}': "f: inner.width is missing",
    "{}": "f: inner is missing",
    "[]": "f: the content must be an object, got an array of 0 items",
    '{"inner":\n {"width" 3}}': "f: not readable JSON (expected ':', line 2 column 11)",
    r'{"name": "\ud800"}': r"f: not readable JSON (\ud800 is half of a surrogate pair)",
    '{"inner": {"width": 3, "pair": [1]}}': "pair must be an array of length 2, got an array of 1",
    "": "f: not readable JSON",
    '{"x": ' + "[" * 10**5: "f: not readable JSON (nested more",
    '{"inner": {"width": 1' + "0" * 5000 + "}}": "f: inner.width",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:40])
def test_errors_name_file_field_and_value(text):
    with pytest.raises(ValueError) as error:
        decode(text.encode(), Outer, "f")
    assert BROKEN[text] in str(error.value)
    assert len(str(error.value)) < 200


def test_values_without_a_type_have_a_bounded_depth():
    def nested(depth):
        return b'{"x": ' * depth + b"1" + b"}" * depth

    decode(nested(MAX_DEPTH - 1))
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        decode(nested(MAX_DEPTH + 1))


def test_python_values_are_checked_alike():
    assert check({"inner": {"width": 3}}, Outer).inner.width == 3
    with pytest.raises(ValueError, match=r"row 3: inner.width must be an integer, got '3'"):
        check({"inner": {"width": "3"}}, Outer, "row 3")


def test_a_byte_order_mark_is_skipped_and_a_large_file_is_not_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert load_json(file) == {}
    with pytest.raises(ValueError, match=r"must have at most 4 bytes, got 5"):
        load_json(file, JsonObject, limit=4)


def test_long_values_are_cut_in_errors():
    assert len(describe("x" * 10**6)) < 70
    assert describe({"a": 1}) == "an object of 1 key"
