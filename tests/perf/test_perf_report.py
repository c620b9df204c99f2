"""What follows from results, and that the committed report and README say what the committed results say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from perf import report, results

ROOT = Path(__file__).parents[2]
SETTINGS = dict.fromkeys(report.SETTINGS) | {
    "size": [180, 320], "batch": 1, "concurrency": 8, "transport": "grpc",
}  # fmt: skip


def row(fps: tuple[float, ...], **settings: Any) -> dict[str, Any]:
    rounds = [{"fps": one, "requests": 100, "p50_ms": 90.0, "p95_ms": 200.0, "stages": {}} for one in fps]
    return {**SETTINGS, **settings, "rounds": rounds}


def sweep(rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    result = results.load_folder(results.FOLDER)["concurrency"]
    committed = {"instances": 2, "queue_delay_us": 0}
    return {**result, "stopped": "", "budget_ms": None, "committed": committed, "rows": rows, **facts}


@pytest.fixture(scope="module")
def drawn() -> tuple[str, str]:
    return report.render(results.load_folder(results.FOLDER))


def test_the_committed_report_is_drawn_from_the_committed_results(drawn: tuple[str, str]) -> None:
    text, _ = drawn

    assert (ROOT / "perf/REPORT.md").read_text() == text, "run `make report`"


def test_readme_has_the_figures_of_the_committed_results() -> None:
    """Every row of README's table has frames/s and MB that `perf.report --readme` prints together."""
    section = (ROOT / "README.md").read_text().split("## Measured")[1].split("\n## ")[0]
    printed = CliRunner().invoke(report.main, ["--readme"]).output

    rows = re.findall(r"^\|[^|]+\| ([\d.]+ \([\d.]+-[\d.]+\)) \| (\d+) MB \|", section, re.MULTILINE)
    assert len(rows) >= 3
    for fps, memory in rows:
        assert re.search(rf"\| {re.escape(fps)} +\| {memory} +\|", printed), (
            f"{fps}, {memory} MB: not measured"
        )


def test_the_page_is_whole_in_one_file_and_its_plots_are_svg(drawn: tuple[str, str]) -> None:
    _, page = drawn

    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', 'href="#'))
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) > 5
    for plot in plots:
        ElementTree.fromstring(plot)


@pytest.mark.parametrize(
    ("fps", "choice"),
    [
        (
            {0: (5.0, 5.4), 1000: (6.0, 6.4), 3000: (6.3, 6.7)},
            1000,
        ),  # 1 ms reaches into the spread of the best
        ({0: (5.0, 5.4), 1000: (5.3, 6.0)}, 0),
        ({0: (5.0,), 1000: (6.0,)}, None),  # one round has no spread
    ],
)
def test_the_least_delay_that_none_beats_beyond_the_spread(
    fps: dict[int, tuple[float, ...]], choice: int | None
) -> None:
    rows = [row(one, queue_delay_us=delay) for delay, one in fps.items()]
    light = [row((9.0, 9.1), queue_delay_us=delay, concurrency=1) for delay in fps]  # does not choose

    assert report.smallest_as_good([*rows, *light], "queue_delay_us") == choice


def test_the_fewest_instances_are_as_good_at_every_batch() -> None:
    fps = {(1, 1): (5.0, 5.4), (1, 4): (6.0, 6.4), (2, 1): (5.8, 6.0), (2, 4): (6.2, 6.6)}
    rows = [row(one, instances=count, batch=batch) for (count, batch), one in fps.items()]

    assert report.smallest_as_good(rows, "instances") == 2  # one instance is beaten at batch 1
    (said,) = report.gains(rows).values()
    assert said == ["1.14 (1.11-1.16)x, faster (batch 1)", "1.03x, faster (batch 4)"]


@pytest.mark.parametrize(
    ("change", "streams"),
    [({}, 2), ({"p95_ms": 251.0}, 1), ({"requests": 99}, 1), ({"fps": 46.0}, 1)],
)
def test_streams_in_time_are_those_within_the_budget_from_enough_requests(
    change: dict[str, float], streams: int
) -> None:
    rows = [row((rate, rate), weights="student", rate_fps=rate) for rate in (12.0, 24.0, 48.0)]
    rows[2]["rounds"] = [{**one, **change} for one in rows[2]["rounds"]]

    assert report.streams(rows, 250) == {"size 320x180": streams}


def test_a_headline_is_a_median_of_enough_rounds_at_a_point_chosen_before() -> None:
    """The sweep `throughput` names the point; the best of a sweep over many points is no headline."""
    few, enough = row((90.0, 91.0)), row((27.0, 28.0, 29.0), weights="student")
    best = sweep([row((95.0, 96.0, 97.0), batch=4)], name="concurrency")

    text, _ = report.render({"throughput": sweep([few, enough], name="throughput"), "concurrency": best})

    short = text.split("## In short")[1].split("\n## ")[0]
    assert "weights student: 28.0 (27.0-29.0) frames/s" in short
    assert not re.search(r"9[0-7]\.\d", short)


def test_an_unfinished_sweep_and_a_disturbed_machine_are_marked() -> None:
    busy = row((7.0, 7.2), instances=2)
    busy["rounds"][0]["others_cores"] = 0.5
    found = {"one": sweep([row((6.0, 6.2), instances=1), busy], stopped="the server ended")}

    text, _ = report.render(found)

    assert "**Not complete**: the server ended." in text
    assert "!7.10 (7.00-7.20)" in text
    assert "!6.10" not in text


def test_a_row_of_the_ladder_has_a_ratio_only_of_rounds_beside_the_baseline() -> None:
    facts = {
        "name": "x",
        "weights": "x",
        "rounds": [{"fps": 10.0, "baseline_fps": 2.0}, {"fps": 9.0, "baseline_fps": 1.5}],
    }

    assert report.ladder_cells(facts, {"networks": {}, "clips": []})["times the baseline"] == "5.5 (5.0-6.0)"
    del facts["rounds"][0]["baseline_fps"], facts["rounds"][1]["baseline_fps"]  # type: ignore[union-attr]
    assert report.ladder_cells(facts, {"networks": {}, "clips": []})["times the baseline"] == "-"
