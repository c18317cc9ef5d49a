from __future__ import annotations

from pathlib import Path

import pytest

from embedkit import ImageError
from embedkit.sources.patterns import expand


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{-01..1}", ["-01", "000", "001"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{c..a}", ["c", "b", "a"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("x{,.bak}", ["x", "x.bak"]),
        ("s3://bucket/{0..1}.tar", ["s3://bucket/0.tar", "s3://bucket/1.tar"]),
        ("a{b}c", ["a{b}c"]),
        ("a{}", ["a{}"]),
        ("open{1..2", ["open{1..2"]),
        ("{1..٣}", ["{1..٣}"]),
    ],
)
def test_braces_stand_for_names(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_a_file_that_is_called_so_is_meant_itself(tmp_path: Path) -> None:
    path = tmp_path / "{a,b}.tar"
    assert len(expand(path)) == 2
    path.touch()
    assert expand(path) == [str(path)]


@pytest.mark.parametrize("pattern", ["{0..1000000}", "{0..999}{0..999}{a,b}", "{1..999999999999999999}", "{a,b}" * 200])
def test_more_than_a_million_names_are_refused(pattern: str) -> None:
    with pytest.raises(ImageError, match="more than 1,000,000 names") as caught:
        expand(pattern)
    assert caught.value.kind == "refused"


def test_a_million_names_are_not() -> None:
    assert len(expand("{0..999}/{0..999}")) == 1_000_000
