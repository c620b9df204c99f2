"""The table at the end of a run counts what tests recorded, and every failure."""

from pathlib import Path

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.parametrize("row", ["silent", "slow"])
@pytest.mark.parametrize("column", ["file", "pipe"])
def test_cell(matrix_cell, row, column):
    ended = matrix_cell("Fault matrix", row, column)
    ended("whole")
    assert (row, column) != ("slow", "pipe")
"""


def test_a_table_with_its_counts(pytester):
    pytester.makeconftest(Path(__file__).with_name("matrix_summary.py").read_text())
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*Fault matrix: 4 tests in 4 cells (3 whole, 1 FAILED)*",
            " *file *pipe*",
            "silent *1 whole *1 whole*",
            "slow *1 whole *1 FAILED*",
        ]
    )
