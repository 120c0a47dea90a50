"""One JSON object per line, and errors that name the line."""

import pytest

from paligemma_jax.data.jsonl import read_jsonl


def test_rows_come_with_their_line_numbers(tmp_path):
    """Blank lines are skipped, and so is a byte order mark; U+2028 does not end a line."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"a": "\u2028"}\n\n \r\n{"b": 2}'.encode())
    assert list(read_jsonl(file)) == [(1, {"a": "\u2028"}), (4, {"b": 2})]


def test_rows_are_read_one_at_a_time(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{')
    rows = read_jsonl(file)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2: not readable JSON \("):
        next(rows)


@pytest.mark.parametrize(
    "line, error",
    [
        (b"{", r"line 2: not readable JSON \(input data was truncated"),
        (b'{"a": NaN}', r"line 2: not readable JSON \(NaN and Infinity are not JSON, column 7"),
        (b"[1]", "line 2: the content must be an object, got an array of 1 item"),
        (b'{"a": "\xff"}', r"line 2: not readable JSON \(not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, r"line 2: not readable JSON \(nested more than 64 levels"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, line, error):
    (tmp_path / "rows.jsonl").write_bytes(b"\n" + line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {error}"):
        list(read_jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))
