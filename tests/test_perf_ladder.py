"""The ladder: missing weights, steady figures, and rows that fail alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from deploy.embedded.server import TritonServer
from perf import clip, report, results
from perf.clip import Size
from perf.errors import PerfError
from perf.ladder import __main__ as ladder
from perf.ladder import bench, rungs, table, weights
from perf.ladder.bench import Bench, Found
from perf.ladder.load import run_load
from perf.ladder.memory import Peak
from perf.ladder.pace import enough, steady_fps
from perf.ladder.rungs import CannotRunError, Rung
from perf.variant import Serving, write_variant

EXACT_KEYS = (
    "name", "params", "flops", "ms_per_frame", "fps", "ratio", "peak_memory_mb", "psnr_db", "psnr_loss_db",
    "tof",
)  # fmt: skip


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mst_gan_student.safetensors"
    with pytest.raises(CannotRunError, match=r"mst_gan_student\.safetensors"):
        weights.find_weights("student", tmp_path)
    path.touch()
    assert weights.find_weights("student", tmp_path) == path


def test_only_the_steady_state_counts() -> None:
    start, steady, end = [5.0, 5.1], [5.2, 5.3, 5.4, 5.5], [9.0]

    assert steady_fps([*start, *steady, *end], in_flight=2) == pytest.approx(10)


def test_too_few_answers_for_a_figure() -> None:
    with pytest.raises(PerfError, match="expected more than 8 answers, found 7"):
        steady_fps([float(i) for i in range(7)], in_flight=4)


@pytest.mark.parametrize("in_flight", [1, 2, 16])
def test_the_whole_clip_passes_in_the_steady_state(in_flight: int) -> None:
    sent, done = in_flight, 0
    while done < sent:
        done += 1
        sent += not enough(done, 99.0, in_flight, 10, 1.0)
    assert len(range(sent)[in_flight - 1 : sent - in_flight + 1]) == 10 + 1


def test_a_fast_rung_goes_on_for_its_time() -> None:
    assert not enough(1000, 0.9, 2, 10, least_s=1.0)


@pytest.mark.server
def test_requests_in_flight_and_their_answers(toy_server: TritonServer, toy_repository: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (5, 16, 32, 3), np.uint8)
    tensors = bench.tensors_of(toy_repository)

    load = run_load(toy_server.grpc_url, tensors, clip.windows(frames, 3), in_flight=4, least_s=0)
    alone = run_load(toy_server.grpc_url, tensors, clip.windows(frames[2:3], 3), in_flight=1, least_s=0)

    assert len(load.done_s) == 5 + 2 * 4 - 1
    assert load.answers.shape == (5, 64, 128, 3)
    # The models enlarge the centre frame and add little: each answer is its own window's.
    for answer, frame in zip(load.answers, frames, strict=True):
        distances = [np.abs(answer[::4, ::4].astype(int) - other).mean() for other in frames]
        assert np.argmin(distances) == [np.array_equal(frame, other) for other in frames].index(True)
    assert alone.answers.shape == (1, 64, 128, 3)


@pytest.mark.server
def test_a_refused_request_is_one_line(toy_server: TritonServer, toy_repository: Path) -> None:
    tensors = replace(bench.tensors_of(toy_repository), model="nobody")
    frames = np.zeros((2, 16, 16, 3), np.uint8)

    with pytest.raises(PerfError, match=r"refused a request.*nobody"):
        run_load(toy_server.grpc_url, tensors, clip.windows(frames, 3), in_flight=2, least_s=0)


def test_one_instance_without_batching(toy_repository: Path, tmp_path: Path) -> None:
    write_variant(toy_repository, tmp_path, Serving(instances=1, batching=False))

    config = text_format.Parse((tmp_path / "generator/config.pbtxt").read_text(), pb.ModelConfig())
    assert sum(group.count for group in config.instance_group) == 1
    assert not config.HasField("dynamic_batching")
    assert config.max_batch_size > 0  # the tensors keep their batch axis


def test_an_export_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    one = Bench(np.zeros((1, 16, 16, 3), np.uint8), tmp_path, rounds=1, least_s=0)

    with pytest.raises(PerfError, match=r"export ended with status 1: expected a checkpoint at .*none\.safe"):
        one.export("pruned", "fp32", tmp_path / "none.safetensors")
    assert not one.exported


PEAKS: dict[str, Any] = {"baseline-fp32": 840, "pruned-int8": 240}
Fake = Callable[[Rung], Found]
Climb = Callable[..., tuple[Result, dict[str, Any]]]


@pytest.fixture
def climb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Climb:
    """The command without exports and servers: frames are noise, and answers are what the test wants."""
    truth = np.random.default_rng(5).integers(0, 256, (6, 64, 64, 3), np.uint8)
    monkeypatch.setattr(ladder, "WORK", tmp_path / "work")
    monkeypatch.setattr(ladder, "read_clip", lambda count, size: (truth[:, ::4, ::4], truth))
    monkeypatch.setattr(ladder, "find_weights", _weights)
    monkeypatch.delenv("VSR_DEBUG", raising=False)

    def run(
        fps: dict[str, Any], *arguments: str, peaks: dict[str, Any] = PEAKS
    ) -> tuple[Result, dict[str, Any]]:
        def measure(self: Bench, rung: Rung, weights: Path) -> Found:
            value = fps[rung.key]
            if isinstance(value, Exception):
                raise value
            answers = (truth // 2 * 2).astype(np.uint8) if rung.target == "cpu" else truth ^ 1
            peak = Peak(100.0, None, 1.5 if rung.key == "pruned-fp32" else 0.0)
            direct = [] if rung.target is None else [value * 2]
            return Found([value.pop(0) if isinstance(value, list) else value], answers, peak, direct)

        def weigh(self: Bench, rung: Rung, weights: Path, size: Size) -> float:
            value = peaks[rung.key]
            if isinstance(value, Exception):
                raise value
            return float(value + size[0])

        monkeypatch.setattr(Bench, "run", measure)
        monkeypatch.setattr(Bench, "peak_mb", weigh)
        result = CliRunner().invoke(ladder.main, ["--size", "16x16", "--out", str(tmp_path), *arguments])
        path = tmp_path / "ladder.json"
        return result, json.loads(path.read_text()) if path.exists() else {}

    return run


def _weights(name: str) -> Path:
    if name == "student":
        raise CannotRunError("no weights")
    return Path("w.safetensors")


FIGURES: dict[str, Any] = {
    "baseline-fp32": 3.0, "pruned-fp32": 4.0, "pruned-int8": 10.0, "pruned-int8-batched": 20.0,
    "compact-int8": 30.0,
}  # fmt: skip


def test_rows_are_set_against_both_measurements_of_the_first(climb: Climb) -> None:
    result, found = climb({"baseline-eager": [1.5, 2.5], **FIGURES})

    assert result.exit_code == 0, result.output
    assert found["complete"]
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["baseline-eager"]["fps_rounds"] == [1.5, 2.5]
    assert rows["baseline-eager"]["spread_percent"] == 50.0
    assert rows["pruned-int8"]["ratio"] == 5.0
    assert rows["pruned-int8"]["ms_per_frame"] == 100.0
    assert rows["pruned-int8"]["serving_cost"] == 1.0  # 10 served, 20 directly
    loss = rows["baseline-eager"]["psnr_db"] - rows["pruned-int8"]["psnr_db"]
    assert rows["pruned-int8"]["psnr_loss_db"] == pytest.approx(loss, abs=1e-3)
    assert rows["pruned-fp32"]["psnr_loss_db"] == 0


def test_every_row_has_every_key_and_says_why_it_has_no_figures(climb: Climb) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES})

    assert {"machine", "date", "commit", "input_size"} <= set(found)
    for row in found["rows"]:
        assert set(EXACT_KEYS) <= set(row)
        assert (row["fps"] is None) == ("why" in row)
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["student-int8"]["why"]
    assert rows["baseline-eager"]["params"] > rows["pruned-int8"]["params"] > 1e6


def test_fp16_says_what_the_machine_lacks(climb: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    _, found = climb({"baseline-eager": 2.0, **FIGURES})

    assert {row["key"]: row.get("why") for row in found["rows"]}["pruned-fp16"] == rungs.NO_FP16


def test_a_row_that_fails_leaves_the_others(climb: Climb) -> None:
    result, found = climb({"baseline-eager": 2.0, **FIGURES, "pruned-fp32": PerfError("it broke\nmid\nhere")})

    assert result.exit_code == 1
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert errors == ["Error: pruned, FP32: it broke here"]
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["pruned-fp32"]["fps"] is None
    assert rows["pruned-fp32"]["why"] == "failed: it broke here"
    assert rows["pruned-int8-batched"]["ratio"] == 10.0


def test_without_the_first_row_there_is_no_ratio(climb: Climb) -> None:
    result, found = climb({"baseline-eager": PerfError("no"), **FIGURES})

    assert result.exit_code == 1
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["pruned-int8"]["fps"] == 10.0
    assert rows["pruned-int8"]["ratio"] is None


def test_what_was_measured_until_an_interruption_is_kept(climb: Climb, tmp_path: Path) -> None:
    result, found = climb({"baseline-eager": 2.0, **FIGURES, "pruned-int8": KeyboardInterrupt()})

    assert result.exit_code != 0
    assert not found["complete"]
    assert "**Not complete**" in " ".join(table.ladder_sections(found)[0].text)
    assert [row["key"] for row in found["rows"] if row["fps"]] == [
        "baseline-eager", "baseline-fp32", "pruned-fp32",
    ]  # fmt: skip


def test_chosen_rows_and_always_the_first(climb: Climb) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES}, "--rows", "pruned-int8")

    assert [row["key"] for row in found["rows"]] == ["baseline-eager", "pruned-int8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "pruned-int4"), "found 'pruned-int4'"),
        (("--size", "320"), "expected WIDTHxHEIGHT"),
        (("--size", "321x180"), "multiples of 4"),
        (("--frames", "2"), "--frames"),
    ],
)
def test_wrong_arguments(climb: Climb, arguments: tuple[str, str], words: str) -> None:
    result, found = climb({}, *arguments)

    assert result.exit_code != 0
    assert words in result.output
    assert not found


def test_memory_is_compared_at_larger_sizes_too(climb: Climb) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES})

    assert found["memory"] == [
        {"input_size": [16, 16], "baseline-fp32": 100.0, "pruned-int8": 100.0},
        {"input_size": [360, 640], "baseline-fp32": 1200.0, "pruned-int8": 600.0},
        {"input_size": [720, 1280], "baseline-fp32": 1560.0, "pruned-int8": 960.0},
    ]
    told = " ".join(table.ladder_sections(found)[0].text)
    assert "at 640x360 600 of 1200 MB, **50%**" in told


def test_no_size_is_weighed_twice(climb: Climb) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES}, "--size", "640x360")

    assert [row["input_size"] for row in found["memory"]] == [[360, 640], [720, 1280]]


def test_a_size_that_fails_ends_the_comparison_of_memory(climb: Climb) -> None:
    result, found = climb({"baseline-eager": 2.0, **FIGURES}, peaks={**PEAKS, "pruned-int8": PerfError("no")})

    assert result.exit_code == 1
    assert "Error: pruned, INT8 at 640x360: no" in result.output
    assert [row["input_size"] for row in found["memory"]] == [[16, 16]]
    assert found["complete"]


def test_without_both_rows_no_memory_is_compared(climb: Climb) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES}, "--rows", "pruned-int8")

    assert found["memory"] == []


def test_report_and_readme(climb: Climb, tmp_path: Path) -> None:
    _, found = climb({"baseline-eager": [1.5, 2.5], **FIGURES})
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")

    for _ in range(2):  # drawn again, it is the same
        arguments = ["--results", tmp_path, "--out", tmp_path, "--readme", readme]
        drawn = CliRunner().invoke(report.main, [*map(str, arguments)])
        assert drawn.exit_code == 0, drawn.output

    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n16x16 -> x4, ")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert text.count("| pruned, INT8 | ") == 1
    assert text.count("| ! pruned, FP32 | ") == text.count("| ! ") == 1  # others were at work meanwhile
    assert "| student, INT8, two instances, batch 4 |" in text
    section = (tmp_path / "REPORT.md").read_text()
    assert found["machine"]["cpu"] in section
    assert "differ by **50.0 %**" in section
    assert "student, INT8, two instances, batch 4: no" in section
    assert "## What does serving a rung cost?" in section
    assert "frames/s" in (tmp_path / "plots/ladder.svg").read_text()


def test_readme_without_markers_is_refused(climb: Climb, tmp_path: Path) -> None:
    _, found = climb({"baseline-eager": 2.0, **FIGURES})
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")

    with pytest.raises(PerfError, match="put them where the table goes"):
        table.write_readme(readme, results.load(tmp_path / "ladder.json"), [])
    assert readme.read_text() == "nothing\n"
    assert found["failed"] == []
