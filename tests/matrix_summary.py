"""Tables of generated tests at the end of a pytest run: rows, columns, and counts in each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

CELL, OUTCOME = "matrix cell", "matrix outcome"  # names of the properties that reports carry

Recorder = Callable[[str], None]
Tables = dict[str, dict[tuple[str, str], Counter[str]]]


@pytest.fixture
def matrix_cell(record_property: Callable[[str, object], None]) -> Callable[[str, str, str], Recorder]:
    """Name the cell that a test fills: ``matrix_cell(title, row, column)``; the result records how it ended.

    Several tests may fill one cell. A test that fails counts as FAILED, whatever it recorded.
    """

    def name_cell(title: str, row: str, column: str) -> Recorder:
        record_property(CELL, (title, row, column))
        return lambda outcome: record_property(OUTCOME, outcome)

    return name_cell


def tables_of(reports: dict[str, list[pytest.TestReport]]) -> Tables:
    """Count outcomes by title and by (row, column), from pytest's reports by outcome."""
    tables: Tables = {}
    for category in ("passed", "failed", "skipped", "error"):
        for report in reports.get(category, []):
            properties = dict(getattr(report, "user_properties", []))
            if CELL in properties:
                title, row, column = properties[CELL]
                outcome = properties.get(OUTCOME, "passed") if category == "passed" else category.upper()
                tables.setdefault(title, {}).setdefault((row, column), Counter())[outcome] += 1
    return tables


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every table with its totals."""
    for title, cells in tables_of(terminalreporter.stats).items():
        total = sum(cells.values(), Counter[str]())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in total.most_common())
        terminalreporter.section(f"{title}: {total.total()} tests in {len(cells)} cells ({counts})")
        rows, columns = (sorted({key[i] for key in cells}) for i in range(2))
        lines = [["", *columns]]
        for row in rows:
            found = [cells.get((row, column), Counter[str]()) for column in columns]
            lines.append([row, *(", ".join(f"{n} {what}" for what, n in one.items()) for one in found)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        for line in lines:
            cells_of_line = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line("  ".join(cells_of_line).rstrip())
