from __future__ import annotations

import csv
import io

import pytest

from seed_exp.base.table import ComparisonRow, comparison_table, csv_text, markdown_table

TEACHER = ComparisonRow("teacher convnet_w32", "MoCo-V2", 1_234_567, 98.06, 98.4)
ALONE = ComparisonRow("student convnet_w2", "MoCo-V2 (no teacher)", 6_120, 88.0, 92.1)
SEED = ComparisonRow("student convnet_w2", "SEED", 6_120, 94.0, 95.7)


def test_columns_are_aligned_for_terminals() -> None:
    lines = markdown_table(
        ["network", "top-1"], [["a", "9.5"], ["a longer name", "100.0"]]
    ).splitlines()
    assert lines == [
        "| network       | top-1 |",
        "| ------------- | ----: |",
        "| a             |   9.5 |",
        "| a longer name | 100.0 |",
    ]


def test_a_table_without_rows_and_with_short_headers_is_still_markdown() -> None:
    assert markdown_table(["a", "k"], []).splitlines() == ["| a   |   k |", "| --- | --: |"]


def test_pipes_in_cells_do_not_open_columns() -> None:
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 columns, but a row has 1 cells: \['x'\]"):
        markdown_table(["a", "b"], [["x"]])


def test_the_comparison_shows_the_gain_over_the_student_without_a_teacher() -> None:
    lines = comparison_table([TEACHER, ALONE, SEED], ALONE).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "network",
        "pre-training",
        "parameters",
        "k-NN (k=10)",
        "linear top-1",
        "vs MoCo-V2 (no teacher)",
    ]
    assert cells[2] == ["teacher convnet_w32", "MoCo-V2", "1,234,567", "98.1", "98.4", ""]
    assert cells[3] == ["student convnet_w2", "MoCo-V2 (no teacher)", "6,120", "88.0", "92.1", ""]
    assert cells[4] == ["student convnet_w2", "SEED", "6,120", "94.0", "95.7", "+3.6"]


def test_the_comparison_works_without_a_baseline() -> None:
    assert "vs" not in comparison_table([TEACHER], k=20)
    assert "k-NN (k=20)" in comparison_table([TEACHER], k=20)


@pytest.mark.parametrize("first", [*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20"])
def test_text_in_csv_is_no_formula_of_a_spreadsheet(first: str) -> None:
    formula = f'{first}HYPERLINK("https://h","x")'
    (row,) = csv.reader(io.StringIO(csv_text([[formula, "resnet18", -1.5, "a=b", None]])))
    assert row == [f"'{formula}", "resnet18", "-1.5", "a=b", ""]
