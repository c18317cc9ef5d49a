from __future__ import annotations

from typing import Any

import pytest

from embedkit.sources.tables.boxes import Box, fragment, read_box


@pytest.mark.parametrize(
    "value",
    ["10 20 30 40", "10,20,30,40", "10, 20, 30, 40", "[10, 20, 30, 40]", " (10;20;30;40) ", "1e1 20.0 +30 40",
     [10, 20, 30, 40], (10.0, 20.0, 30.0, 40.0), ["10", "20", "30", "40"]],
)  # fmt: skip
def test_one_column_holds_four_numbers_as_people_write_them(value: Any) -> None:
    assert read_box([value], "xyxy") == (10, 20, 30, 40)
    assert read_box([value], "xywh") == (10, 20, 40, 60)


def test_four_columns_hold_one_each() -> None:
    assert read_box(["10", " 20", "30", "40"], "xyxy") == (10, 20, 30, 40)
    assert read_box([10, 20.0, "30", 40], "xywh") == (10, 20, 40, 60)


@pytest.mark.parametrize("values", [[None], [""], ["  "], ["[]"], [[]], [[None] * 4], ["", "", "", ""], [None] * 4,
                                    [float("nan")] * 4])  # fmt: skip
def test_an_empty_box_is_none(values: list[Any]) -> None:
    assert read_box(values, "xyxy") is None


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        ([0.4, 0.5, 9.5, 9.4], (0, 1, 10, 9)),
        ([-3.2, -3.5, 5, 5], (-3, -3, 5, 5)),  # May leave the image; that is seen when it is read.
        ([0, 0, 1, 1], (0, 0, 1, 1)),
        ([0.1, 0.2, 1.6, 1.2], (0, 0, 2, 1)),
    ],
)
def test_edges_are_rounded_to_whole_pixels(numbers: list[float], box: Box) -> None:
    assert read_box([numbers], "xyxy") == box


def test_sizes_are_added_before_they_are_rounded() -> None:
    assert read_box([[0.4, 0.4, 10.2, 10.0]], "xywh") == (0, 0, 11, 10)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["1 2 3"], "4 numbers, not 3"),
        (["1 2 3 4 5"], "4 numbers, not 5"),
        ([[[1, 2, 3, 4]]], "4 numbers, not 1"),
        ([{"x": 1}], "4 numbers, not 1"),
        ([7], "4 numbers, not 1"),
        (["a b c d"], "4 numbers, not 'a b c d'"),
        (["1", "", "3", "4"], r'4 numbers, not \["1", "", "3", "4"\]'),
        ([[None, b"x", 1]], "4 numbers, not 3: .null, "),
        ([1, None, 3, 4], "4 numbers"),
        (["1 2 nan 4"], "of ordinary size"),
        (["1 2 inf 4"], "of ordinary size"),
        ([[1, 2, 3e9, 4]], "of ordinary size"),
        ([[1, 2, 10**400, 4]], "4 numbers"),
        (["0.1 0.2 0.5 1"], "in pixels, not in parts of the image"),
        (["10 20 10 40"], "^a box from 10,20 to 10,40 holds nothing; if 10,40 is its size, say --box-format xywh$"),
        (["30 20 -10 40"], "^a box from 30,20 to -10,40 holds nothing$"),
        (["5 5 5.3 9"], "^a box from 5,5 to 5,9 holds nothing"),
        (["x" * 10_000], "^.{1,150}$"),
    ],
)
def test_what_is_no_box_says_why(values: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_box(values, "xyxy")


def test_a_fragment_names_left_top_width_and_height() -> None:
    assert fragment((10, 20, 30, 60)) == "#xywh=10,20,20,40"


def test_a_size_that_is_none_is_told_by_its_edges() -> None:
    with pytest.raises(ValueError, match=r"^a box from 50,50 to 10,60 holds nothing$"):
        read_box(["50 50 -40 10"], "xywh")
