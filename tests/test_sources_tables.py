from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from embedkit import ImageError, MissingExtraError
from embedkit.sources.tables.rows import BadRowError, open_table, text_of


def table(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, *columns: str) -> list[tuple[int, Any]]:
    """Return the rows of a table, of a bad one the reason."""
    return [
        (number, values.args[0] if isinstance(values, BadRowError) else list(values))
        for number, values in open_table(path).rows(columns)
    ]


def refused(path: Path, *columns: str) -> ImageError:
    """Return the error that reading a table raises."""
    with pytest.raises(ImageError) as caught:
        rows(path, *columns)
    assert caught.value.id == os.fspath(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "path,label\na.jpg,cat\nb.jpg,\n"),
        ("t.CSV", "path,label\na.jpg,cat\nb.jpg,"),
        ("t.csv", b"\xef\xbb\xbfpath,label\r\na.jpg,cat\r\nb.jpg,\r\n"),
        ("t.csv", "path;label\na.jpg;cat\nb.jpg;\n"),
        ("t.csv", "path\tlabel\na.jpg\tcat\nb.jpg\t\n"),
        ("t.tsv", "path\tlabel\na.jpg\tcat\nb.jpg\t\n"),
        ("t.csv", '"path","label"\n"a.jpg","cat"\n"b.jpg",""\n'),
    ],
    ids=["plain", "no last newline", "bom and crlf", "semicolons", "tabs in csv", "tsv", "quoted"],
)
def test_texts_of_lines_are_told_apart(tmp_path: Path, name: str, content: bytes | str) -> None:
    path = table(tmp_path, name, content)
    assert open_table(path).columns == ["path", "label"]
    assert open_table(path).unit == "line"
    assert rows(path, "label", "path") == [(2, ["cat", "a.jpg"]), (3, ["", "b.jpg"])]


def test_quoted_values_hold_separators_quotes_and_newlines(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", 'path,label\n"a,b.jpg","say ""hi"""\n"two\nlines.jpg",x\n\nc.jpg,y\n')
    assert rows(path, "path", "label") == [
        (2, ["a,b.jpg", 'say "hi"']),
        (4, ["two\nlines.jpg", "x"]),
        (6, ["c.jpg", "y"]),
    ]


def test_bytes_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    for name, content in (("t.csv", b"path\ncaf\xe9.jpg\n"), ("t.jsonl", b'{"path": "caf\xe9.jpg"}')):
        ((_, (value,)),) = rows(table(tmp_path, name, content), "path")
        assert os.fsencode(value) == b"caf\xe9.jpg"


def test_empty_tables_have_no_columns_and_a_header_has_no_rows(tmp_path: Path) -> None:
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        assert open_table(table(tmp_path, name, "")).columns == []
        assert open_table(table(tmp_path, name, "\n\n")).columns == []
    assert rows(table(tmp_path, "t.csv", "path,label"), "path") == []


@pytest.mark.parametrize(
    ("lines", "bad", "reason"),
    [
        (["b.jpg"], [3], "1 value for 2 columns; quote values that contain a comma"),
        (["b.jpg,cat,x"], [3], "3 values for 2 columns; quote values that contain a comma"),
        (['"b.jpg,x'], [3], "',' expected after '\"'; is a quotation mark left open?"),
        (['"b"x.jpg,x'], [3], "',' expected after '\"'; is a quotation mark left open?"),
        (["b.jpg," + "x" * 200_000], [3], "field larger than field limit (131072); is a quotation mark left open?"),
        (['"b.jpg,x', 'c.jpg,y"'], [3], "1 value for 2 columns; is a quotation mark left open?"),
    ],
    ids=["short", "long", "open quote", "text after a quote", "giant field", "open over two lines"],
)
def test_a_broken_line_of_csv_costs_itself_alone(tmp_path: Path, lines: list[str], bad: list[int], reason: str) -> None:
    path = table(tmp_path, "t.csv", "\n".join(["path,label", "a.jpg,cat", *lines, '"y,.jpg",ox', "z.jpg,dog"]))
    found = dict(rows(path, "path"))
    last = 2 + len(lines)
    assert found[2] == ["a.jpg"] and found[last + 1] == ["y,.jpg"] and found[last + 2] == ["z.jpg"]
    assert [number for number, row in found.items() if isinstance(row, str)] == bad
    assert found[bad[0]] == reason and len(found) == last + 1


def test_a_quotation_mark_that_is_never_closed_costs_its_line(tmp_path: Path) -> None:
    many = [f"{number}.jpg,cat" for number in range(20_000)]  # More than a field may hold.
    for after in (many[:3], many):
        path = table(tmp_path, "t.csv", "\n".join(["path,label", "a.jpg,cat", '"b.jpg,x', *after]))
        found = rows(path, "path")
        assert [number for number, row in found if isinstance(row, str)] == [3]
        assert len(found) == 2 + len(after) and found[-1] == (3 + len(after), [after[-1].partition(",")[0]])


def test_a_broken_header_of_csv_is_an_error_of_the_table(tmp_path: Path) -> None:
    reason = refused(table(tmp_path, "t.csv", '"path"x,label\na.jpg,cat\n')).reason
    assert reason.startswith("line 1: ") and "quotation mark" in reason


def test_bytes_that_are_no_text_and_utf_16_are_told_apart(tmp_path: Path) -> None:
    assert rows(table(tmp_path, "t.csv", b"path\n" + b"\xff\xfe"), "path") == [(2, ["\udcff\udcfe"])]
    assert "its text is UTF-16; save it as UTF-8" in refused(table(tmp_path, "t.csv", "path\n".encode("utf-16"))).reason


def test_a_tab_is_called_a_tab(tmp_path: Path) -> None:
    ((_, reason),) = rows(table(tmp_path, "t.tsv", "path\tlabel\na.jpg\n"), "path")
    assert "contain a tab" in reason


def test_a_record_without_an_end_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", "path,label\n" + ('"' + "x" * 100_000 + '\n",') * 400)
    assert "has more than 33,554,432 characters" in refused(path, "path").reason


def test_a_file_without_line_breaks_is_not_read_as_a_whole(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl"):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(1 << 36)  # 64 GiB of nothing.
        assert "line 1 has more than 16,777,216 characters" in refused(path, "path").reason


def test_json_lines_may_each_have_other_keys(tmp_path: Path) -> None:
    path = table(tmp_path, "t.ndjson", '{"path": "a.jpg"}\n\n{"label": 3, "path": "b.jpg", "box": [1, 2]}\r\n')
    assert open_table(path).columns == ["path", "label", "box"]
    assert rows(path, "path", "label", "box") == [(1, ["a.jpg", None, None]), (3, ["b.jpg", 3, [1, 2]])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"path": "b.jpg"', "not JSON: Expecting ',' delimiter"),
        ("b.jpg", "not JSON: "),
        ('["b.jpg"]', 'not an object such as {"path": "1.jpg"}'),
        ("[" * 200_000, "not JSON: "),
        ('{"path": ' + "9" * 5000 + "}", "not JSON: "),
    ],
    ids=["cut", "text", "list", "deep", "giant number"],
)
def test_a_broken_line_of_json_costs_itself_alone(tmp_path: Path, line: str, reason: str) -> None:
    path = table(tmp_path, "t.jsonl", '{"path": "a.jpg"}\n' + line + '\n{"path": "c.jpg"}\n')
    first, (number, bad), last = rows(path, "path")
    assert (first, number, last) == ((1, ["a.jpg"]), 2, (3, ["c.jpg"]))
    assert bad.startswith(reason) and len(bad) < 300


def test_json_lines_of_which_none_is_an_object_are_an_error(tmp_path: Path) -> None:
    error = refused(table(tmp_path, "t.jsonl", "\n[1]\n[2]\n"))
    assert error.reason == 'none of 2 lines can be used; the first: line 2: not an object such as {"path": "1.jpg"}'
    assert refused(table(tmp_path, "t.jsonl", "x\n" * 5000)).reason.startswith("none of 1,000 lines can be used")


def test_keys_without_end_are_an_error(tmp_path: Path) -> None:
    path = table(tmp_path, "t.jsonl", "".join(f'{{"path": "a", "k{number}": 1}}\n' for number in range(10_001)))
    assert "more than 10,000 different keys" in refused(path).reason


def test_parquet_gives_values_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    count = 20_000  # More than a batch.
    columns = {
        "path": [f"{n}.jpg" for n in range(count)],
        "a.b": [n % 7 if n % 3 else None for n in range(count)],
        "kind": pyarrow.array([str(n % 2) for n in range(count)]).dictionary_encode(),
        "box": [[n, 1.5] for n in range(count)],
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3000)
    assert open_table(path).columns == ["path", "a.b", "kind", "box"]
    assert open_table(path).unit == "row"
    found = rows(path, "box", "a.b", "kind", "path")
    assert found == [(n + 1, [[float(n), 1.5], n % 7 if n % 3 else None, str(n % 2), f"{n}.jpg"]) for n in range(count)]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"path": [f"{n}.jpg" for n in range(5000)]}), path, compression="none")
    whole = path.read_bytes()
    for content in (b"", b"path\na.jpg\n", whole[:-100], whole[: len(whole) // 2], b"\0" * 200 + whole[200:]):
        path.write_bytes(content)
        assert "is damaged, or not a Parquet file: " in refused(path, "path").reason


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"embedkit\[parquet\]"):
        open_table(table(tmp_path, "t.parquet", b"PAR1"))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "t.csv").reason
    if sys.platform != "win32":
        assert "no such file" in refused(tmp_path / "t.parquet").reason
    assert "is no table; what is: .csv .tsv .jsonl .ndjson .parquet" in refused(table(tmp_path, "t.xlsx", "")).reason
    os.mkfifo(tmp_path / "pipe.csv")  # Would wait for ever.
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        assert refused(tmp_path / name).reason == "is not a regular file"


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), ("", None), (None, None), (3, "3"), (3.0, "3"), (2.5, "2.5"), (float("nan"), None), (True, "true"),
     (False, "false"), (b"caf\xe9", "caf\udce9"), (b"", None), (0, "0")],
)  # fmt: skip
def test_values_become_texts(value: Any, text: str | None) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("value", [["a", "b"], [], {"a": 1}, object()])
def test_what_is_not_one_value_is_no_text(value: Any) -> None:
    with pytest.raises(ValueError, match="not one text or number"):
        text_of(value)
