"""Medians, ratios and percentiles of measured rounds; results files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from perf import report, results
from perf.results import Figure, PerfError


def test_a_figure_is_its_median_with_the_least_and_the_most() -> None:
    one = Figure((9.0, 1.0, 2.0))

    assert (one.median, one.low, one.high) == (2.0, 1.0, 9.0)
    assert one.text(1) == "2.0 (1.0-9.0)"
    assert Figure((3.0,)).text(0) == "3"


def test_a_ratio_is_of_rounds_in_turns_and_not_of_medians() -> None:
    """The machine got twice as slow during the run, in both rows alike."""
    ratio = results.ratios([20.0, 10.0], [10.0, 5.0])

    assert (ratio.low, ratio.high) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "meaning"),
    [((0.9, 1.2), "within the spread"), ((1.1, 1.2), "faster"), ((0.8, 0.9), "slower"),
     ((2.0,), "one round, spread unknown")],
)  # fmt: skip
def test_a_difference_counts_beyond_the_spread(values: tuple[float, ...], meaning: str) -> None:
    assert results.meaning(Figure(values)) == meaning


def test_percentiles_come_from_enough_requests_or_say_how_few_there_were() -> None:
    assert [results.least_samples(n) for n in (50, 95, 99)] == [10, 100, 500]
    row = {"rounds": [{"requests": 100, "p95_ms": 7.0, "p99_ms": 9.0}, {"requests": 120, "p95_ms": 9.0}]}

    assert results.percentile_text(row, 95) == "8 (7-9)"
    assert results.percentile_text(row, 99) == "too few (100 of 500)"
    row["rounds"][0]["requests"] = 99
    assert results.percentile_text(row, 95) == "too few (99 of 100)"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "mst-gan-perf/1", "kind": "sweep", "name": "x"}'])
def test_foreign_results_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)

    result = CliRunner().invoke(report.main, ["--results", str(tmp_path), "--out", str(tmp_path)])

    assert result.exit_code == 1
    assert "measure again or remove it" in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "REPORT.md").exists()


def test_an_empty_folder_of_results(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match="found none: run `make measure` first"):
        results.load_folder(tmp_path)
