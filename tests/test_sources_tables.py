from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from embedkit import ImageError, MissingExtraError
from embedkit.sources.tables.rows import open_table, text_of


def table(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, *columns: str) -> list[tuple[int, list[Any]]]:
    return [(number, list(values)) for number, values in open_table(path).rows(columns)]


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
    ("content", "reason"),
    [
        ("path,label\na.jpg,cat\nb.jpg\n", "line 3: 1 values for 2 columns; quote values that contain a comma"),
        ("path,label\na.jpg,cat,x\n", "line 2: 3 values for 2 columns"),
        ('path,label\na.jpg,cat\n"b.jpg,x\nc.jpg,y\n', "line 3: .*is a quotation mark left open"),
        ('path,label\na.jpg,cat\n"b"x.jpg,x\n', "line 3: .*expected after"),
        ("path,label\na.jpg," + "x" * 200_000, "line 2: field larger than field limit"),
        (b"path\n" + b"\xff\xfe", None),
        ("path\n".encode("utf-16"), "its text is UTF-16; save it as UTF-8"),
    ],
    ids=["short", "long", "open quote", "text after a quote", "giant field", "odd bytes", "utf-16"],
)
def test_a_broken_line_of_csv_is_named(tmp_path: Path, content: bytes | str, reason: str | None) -> None:
    path = table(tmp_path, "t.csv", content)
    if reason is None:
        assert rows(path, "path") == [(2, ["\udcff\udcfe"])]
    else:
        with pytest.raises(ImageError, match=reason):
            rows(path, "path")


def test_a_tab_is_called_a_tab(tmp_path: Path) -> None:
    assert "contain a tab" in refused(table(tmp_path, "t.tsv", "path\tlabel\na.jpg\n"), "path").reason


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
        ('{"path": "b.jpg"', "line 2 is not JSON: "),
        ("b.jpg", "line 2 is not JSON: "),
        ('["b.jpg"]', 'line 2 is not an object such as {"path": "1.jpg"}'),
        ("[" * 200_000, "line 2 is not JSON: "),
        ('{"path": ' + "9" * 5000 + "}", "line 2 is not JSON: "),
    ],
    ids=["cut", "text", "list", "deep", "giant number"],
)
def test_a_broken_line_of_json_is_named(tmp_path: Path, line: str, reason: str) -> None:
    error = refused(table(tmp_path, "t.jsonl", '{"path": "a.jpg"}\n' + line + "\n"), "path")
    assert error.reason.startswith(reason)


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
