"""The report says what the results say, marks what is doubtful, and needs nothing beside itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from perf import report, results
from perf.findings import verdict
from perf.points import Figure

SAMPLES = Path(__file__).parent / "perf_results"


def draw(*arguments: str | Path) -> str:
    result = CliRunner().invoke(report.main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    draw("--results", SAMPLES, "--out", out)
    return out


def section(text: str, title: str) -> str:
    """From one heading to the next."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_tables_show_medians_spread_and_doubt(drawn: Path) -> None:
    text = section((drawn / "REPORT.md").read_text(), "More in flight?")

    assert "| 1 in flight | ~4.10 (4.00-4.20) | 250 | 325 | 400 | 2.50 | 900 |" in text
    assert "| 4 in flight | 8.10 (8.00-8.20) |" in text
    assert "at 1 of 3 points" in text
    assert "![More in flight?](plots/concurrency.svg)" in text


def test_every_part_names_its_machine_versions_date_and_commit(drawn: Path) -> None:
    parts = (drawn / "REPORT.md").read_text().split("\n## ")[1:]

    assert [part.partition("\n")[0] for part in parts[:2]] == ["In short", "What was measured where"]
    parts = parts[2:]
    assert len(parts) == 5  # concurrency, its stages, instances, load, its streams; nothing of an empty sweep
    for part in parts:
        for fact in (
            "Test CPU, 2 cores",
            "nvidia-pytriton 0.7.0",
            "2026-01-02",
            "commit abc1234",
            "0123456789ab",
        ):
            assert fact in part


def test_streams_in_real_time(drawn: Path) -> None:
    text = section((drawn / "REPORT.md").read_text(), "How many streams in real time?")

    assert (
        "| 320x180 | 24 | 83 | 30.0 | 1 |" in text
    )  # p95 52 ms at 30 frames/s is in time, 117 ms at 70 is not
    assert "| 320x180 | 30 | 67 | 30.0 | 1 |" in text


def test_shortest_queue_delay_within_the_spread_of_the_best(tmp_path: Path) -> None:
    result = results.load(SAMPLES / "instances.json")
    pattern = result["points"][0]
    result["points"] = []
    for delay, fps in ((0, (5.0, 5.4)), (1000, (6.0, 6.4)), (3000, (6.3, 6.7)), (9000, (5.0, 7.0))):
        rounds = [{**pattern["rounds"][0], "fps": one} for one in fps]
        result["points"].append({**pattern, "queue_delay_us": delay, "rounds": rounds})
    results.write(tmp_path, result)

    draw("--results", tmp_path, "--out", tmp_path)

    text = (tmp_path / "REPORT.md").read_text()
    assert "With 4 in flight the most comes out at delay 3 ms (6.50 (6.30-6.70) frames/s)." in text
    assert "the choice: **delay 1 ms (6.20 (6.00-6.40) frames/s)**" in text


def instances(path: Path, fps: dict[tuple[int, int], tuple[float, ...]], **more: Any) -> str:
    """The text of a sweep with these frames/s by instance groups and batch."""
    result = results.load(SAMPLES / "instances.json")
    pattern = result["points"][0]
    result["points"] = [
        {
            **pattern,
            "instances": count,
            "batch": batch,
            "rounds": [{**pattern["rounds"][0], "fps": f} for f in v],
        }
        for (count, batch), v in fps.items()
    ]
    results.write(path, {**result, **more})
    draw("--results", path, "--out", path)
    return section((path / "REPORT.md").read_text(), "One or two?")


def test_gains_come_with_their_spread_and_lead_to_a_choice(tmp_path: Path) -> None:
    fps = {(1, 1): (5.0, 5.4), (1, 4): (6.0, 6.4), (2, 1): (5.8, 6.0), (2, 4): (6.2, 6.6)}

    text = instances(tmp_path, fps, committed={"instances": 1})

    gains = "+13% at batch 1 (faster); +3% at batch 4 (within the spread)"
    assert f"Frames/s of 2 instance groups against 1 instance group: {gains}." in text
    assert "and so the choice: **2 instance groups**." in text
    assert "1 instance group, **which is not the choice**" in text


def test_fewer_instances_do_where_more_give_nothing_beyond_the_spread(tmp_path: Path) -> None:
    fps = {(1, 1): (5.0, 5.4), (2, 1): (5.3, 6.0)}

    text = instances(tmp_path, fps, committed={"instances": 1})

    assert "and so the choice: **1 instance group**. Served as committed: 1 instance group." in text
    assert "**One round" not in text


def test_different_machines_are_named_and_not_to_be_mixed(tmp_path: Path, drawn: Path) -> None:
    warning = "**These are different machines.**"
    assert warning not in (drawn / "REPORT.md").read_text()
    shutil.copytree(SAMPLES, tmp_path / "in")
    result = results.load(SAMPLES / "load.json")
    results.write(tmp_path / "in", {**result, "machine": {**result["machine"], "cpu": "Other CPU"}})

    draw("--results", tmp_path / "in", "--out", tmp_path)

    sources = section((tmp_path / "REPORT.md").read_text(), "What was measured where")
    assert warning in sources
    assert "| load | Other CPU, 2 cores (AVX2, AVX512-VNNI), 8 GB; no GPU | 2026-01-02 03:04 UTC |" in sources


def test_unfinished_sweep_says_so(drawn: Path) -> None:
    text = section((drawn / "REPORT.md").read_text(), "One or two?")

    assert "**Not complete**: tritonserver ended with status -9." in text


def test_points_on_a_busy_machine_are_marked(drawn: Path) -> None:
    text = section((drawn / "REPORT.md").read_text(), "One or two?")

    assert "| 1 instance group | 6.10" in text
    assert "| 2 instance groups | !7.10" in text
    assert "at 1 of 2 points" in text


def test_file_to_file_names_the_bottleneck_and_who_disturbed(tmp_path: Path) -> None:
    machine = results.load(SAMPLES / "load.json")["machine"]
    sides = {"bare, batch 1, 1 stream": [10.0, 11.0], "served, file to file": [8.0, 9.0]}
    result = {
        "kind": "overhead", "name": "overhead", "machine": machine, "size": [180, 320], "frames": 80,
        "encoder": "H.264", "fps": sides, "best_bare": "bare, batch 1, 1 stream",
        "others_cores": {"served, file to file": 0.4}, "served_over_best_bare": 0.81,
        "served_over_analyzed": 0.9, "client_stages_s": {"decode": 0.1, "inference": 8.0, "encode": 2.0},
    }  # fmt: skip
    results.write(tmp_path, result)

    draw("--results", tmp_path, "--out", tmp_path)

    text = (tmp_path / "REPORT.md").read_text()
    assert "The bottleneck is **inference**" in text
    assert "| served, file to file | !8.50 (8.00-9.00) |" in text
    assert "at 1 of 2 sides" in text
    assert (
        "| file to file, 320x180, H.264 | 8.5 (8.0-9.0) frames/s; bottleneck: inference | overhead |" in text
    )


def test_page_is_whole_in_one_file(drawn: Path) -> None:
    page = (drawn / "report.html").read_text()

    assert page.count("<svg") == len(list((drawn / "plots").glob("*.svg"))) == 4
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', 'href="#'))
    assert "<strong>Not complete</strong>" in page


def test_plots_are_readable_svg_with_the_words_in_them(drawn: Path) -> None:
    for path in (drawn / "plots").glob("*.svg"):
        ElementTree.fromstring(path.read_text())
    assert "requests in flight" in (drawn / "plots/concurrency.svg").read_text()
    assert "generator: infer" in (drawn / "plots/concurrency_stages.svg").read_text()


def test_same_results_give_the_same_files(drawn: Path, tmp_path: Path) -> None:
    draw("--results", SAMPLES, "--out", tmp_path)

    assert (tmp_path / "report.html").read_bytes() == (drawn / "report.html").read_bytes()


def test_comparison_with_an_earlier_run(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES, tmp_path / "base")
    path = tmp_path / "base/instances.json"
    path.write_text(path.read_text().replace('"fps": 6.', '"fps": 5.'))

    draw("--results", SAMPLES, "--base", tmp_path / "base", "--out", tmp_path)

    text = section((tmp_path / "REPORT.md").read_text(), "Against the earlier run: One or two?")
    assert "| 1 instance group | 5.10 (5.00-5.20) | 6.10 (6.00-6.20) | +19.6% | faster |" in text
    assert "| 2 instance groups | 7.10 (7.00-7.20) | 7.10 (7.00-7.20) | +0.0% | within the spread |" in text


def test_comparison_of_other_results_than_sweeps(tmp_path: Path) -> None:
    machine = results.load(SAMPLES / "load.json")["machine"]
    for folder, fps in (("base", [5.0, 6.0]), ("now", [7.0, 8.0])):
        row = {
            "network": "N",
            "runtime": "R",
            "size": [180, 320],
            "ms_per_frame": [1000 / one for one in fps],
        }
        network = {"parameters": 1, "flops": 1.0, "flops_at_papers_size": 1.0}
        facts = {
            "kind": "peers",
            "name": "peers",
            "threads": 2,
            "size": [180, 320],
            "papers_size": [720, 1280],
        }
        rows = {"networks": {"N": network}, "rows": [{**row, "peak_memory_mb": 1.0}]}
        results.write(tmp_path / folder, {**facts, **rows, "machine": {**machine, "cpu": folder}})

    draw("--results", tmp_path / "now", "--base", tmp_path / "base", "--out", tmp_path)

    text = section((tmp_path / "REPORT.md").read_text(), "Against the earlier run: peers")
    assert "| N, R, 320x180 | 5.50 (5.00-6.00) | 7.50 (7.00-8.00) | +36.4% | faster |" in text
    assert "**Another machine**" in text


@pytest.mark.parametrize(
    ("before", "after", "meaning"),
    [
        ((5.0, 6.0), (5.9, 7.0), "within the spread"),
        ((5.0, 6.0), (6.1, 7.0), "faster"),
        ((5.0, 6.0), (4.0, 4.9), "slower"),
        ((5.0,), (9.0, 9.1), "one round: spread unknown"),
    ],
)
def test_verdict(before: tuple[float, ...], after: tuple[float, ...], meaning: str) -> None:
    assert verdict(Figure(before), Figure(after)) == meaning


def test_results_of_another_schema_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"fps": 8}')

    result = CliRunner().invoke(report.main, ["--results", str(tmp_path), "--out", str(tmp_path)])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected schema mst-gan-perf/1 in ")
    assert result.output.count("\n") == 1
    assert not (tmp_path / "REPORT.md").exists()
