"""The plan for a library of films: arithmetic by hand, the simulation, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perf import capacity, results
from perf.capacity import Library, Rates, rates, simulate
from perf.results import Figure, PerfError

MACHINE = {"cpu": "a processor", "cores": 2, "date": "2026-01-01"}


def row(**values: Any) -> dict[str, Any]:
    return {"rounds": [{"fps": value} for value in values.pop("fps")], **values}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Made-up results with round numbers: one more pixel costs as much as any other."""
    for result in (
        {
            "kind": "ladder", "name": "ladder", "size": [100, 100],
            "rows": [
                row(key="a", weights="student", fps=[30.0]),
                row(key="student-eager", weights="student", fps=[1.0]),
                row(key="b", weights="student", fps=[40.0, 50.0, 60.0]),
            ],
        },
        {
            "kind": "sweep", "name": "sizes",
            "rows": [row(size=[100, 100], fps=[20.0]), row(size=[200, 200], fps=[4.0])],
        },
        {
            "kind": "end_to_end", "name": "end_to_end",
            "rows": [row(name="perf_analyzer", fps=[20.0]), row(name="file to file", fps=[10.0])],
        },
    ):  # fmt: skip
        results.write(tmp_path, {"machine": MACHINE, **result})
    return tmp_path


def run(folder: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(capacity.main, ["--results", str(folder), *options])
    return result.exit_code, result.output


def test_rates_by_hand(measured: Path) -> None:
    found = results.load_folder(measured)
    same = rates(found, "student", (100, 100))
    assert same == Rates(Figure((40.0, 50.0, 60.0)), 1.0, pytest.approx(0.05), 1.0)
    assert same.film_to_film(50.0) == pytest.approx(1 / (1 / 50 + 0.05))
    larger = rates(found, "student", (200, 200))  # 4 frames/s of 20, and four times the pixels to encode
    assert larger.film_to_film(50.0) == pytest.approx(1 / (1 / 10 + 0.2))


def test_films_and_failures() -> None:
    assert simulate(7, 3600, 2, 1e12, 60) == capacity.Outcome(4.0, pytest.approx(7 / 8), 0)
    often = simulate(1000, 3600, 10, 7200, 600)
    assert often == simulate(1000, 3600, 10, 7200, 600)
    assert often.failures == pytest.approx(500, abs=100)  # four standard deviations
    assert 100 < often.hours < 100 * (3600 + 2 * 600) / 3600


def test_a_plan(measured: Path) -> None:
    options = ("--films", "100", "--minutes", "60", "--fps", "25", "--size", "200x200", "--target", "student")
    status, text = run(measured, *options, "--days", "10", "--mtbf-days", "1e9")
    assert status == 0, text
    assert "estimate  3.33 (3.08-3.53) frames/s" in text
    # A film takes 90 000 frames / 3.33 = 7.5 h; in 240 h a machine makes 32, so four make 100.
    assert "plan      4 such machines: 188 h" in text
    assert re.search(r"bytes +0\.7 TB", text)  # 100 h of 16.5 Mbit/s
    assert "first bottleneck: processors" in text
    assert Library(100, 60, 25, (200, 200), 1.5, 15).frame_bytes == 3 * 200 * 200 * 3 + 800 * 800 * 3
    status, text = run(measured, *options, "--days", "100", "--storage-gbit", "0.002", "--mtbf-days", "1e9")
    assert status == 0 and "first bottleneck: storage of 0.002 Gbit/s" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "teacher"), "expected targets that were measured among student; found 'teacher'"),
        (("--storage-gbit", "0.001"), "expected to read and write 111 TB in 30 days"),
        (("--films", "2", "--days", "0.1"), "one film takes a machine"),
    ],
)
def test_there_is_no_plan(measured: Path, options: tuple[str, ...], text: str) -> None:
    status, output = run(measured, *options)
    assert status == 1 and len(output.splitlines()) == 1 and text in output


def test_usage_and_missing_results(measured: Path) -> None:
    assert run(measured, "--size", "640")[0] == 2
    assert run(measured, "--films", "0")[0] == 2
    (measured / "sizes.json").unlink()
    with pytest.raises(PerfError, match="expected results of sizes, found none"):
        rates(results.load_folder(measured), "student", (100, 100))


def test_the_committed_results_make_a_plan() -> None:
    status, text = run(results.FOLDER, "--films", "10000", "--minutes", "90", "--size", "640x360")
    assert status == 0 and re.search(r"plan +\d+ such machines", text) and "first bottleneck" in text
