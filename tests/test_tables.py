import io

import pytest
from rich.console import Console

from lmerge.tables import markdown_table, print_columns, split_columns

HEADING = ["method", "loss above", "speed", "minus best baseline"]
LINES = [
    ["last layers", "+1.234", "1.10x", "+0.100 [+0.050, +0.150] to block"],
    ["block [half]", "-0.120", "1.12x", ""],
]


def printed(width: int) -> str:
    stream = io.StringIO()
    print_columns("a table [1]", HEADING, LINES, console=Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_table_is_no_wider_than_the_terminal(width: int) -> None:
    assert all(len(line) <= width for line in printed(width).splitlines())


def test_a_table_that_fits_is_one_table() -> None:
    assert printed(200).count("method") == 1
    assert "a table [1]" in printed(200)


def test_a_wide_table_goes_on_below_with_its_first_column_and_loses_nothing() -> None:
    text = printed(60)
    assert text.count("method") == 2
    assert text.count("a table") == 1
    for cell in (cell for line in LINES for cell in line):
        assert cell in text


def test_every_column_stands_in_one_part() -> None:
    for width in range(5, 60):
        parts = split_columns([4, 6, 9, 3, 20], width, 1)
        assert [i for part in parts for i in part] == [1, 2, 3, 4]


def test_columns_fill_a_part_to_its_last_character() -> None:
    # Two columns of 4 and 6 characters need 1 + 7 + 9.
    assert split_columns([4, 6, 6], 26, 1) == [[1, 2]]
    assert split_columns([4, 6, 6], 25, 1) == [[1], [2]]


def test_a_markdown_table_has_a_line_below_its_heading() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
