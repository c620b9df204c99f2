"""The ladder's rounds and clips, and all commands of `make measure` once on a real server at toy size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from requirements import missing

from perf import end_to_end, ladder, report, results, sweep
from perf.analyzer import Load, find_analyzer
from perf.machine import ROOT
from perf.peers.__main__ import main as peers_main
from perf.results import PerfError


def test_the_default_test_clip_was_never_trained_on() -> None:
    """Big Buck Bunny is in the training footage; of the package's clips, this street scene is not."""
    (clip,) = ladder.read_clips(None, 6)

    assert clip.name == "bikes.mp4"
    assert clip.truth.shape == (6, 128, 320, 3)
    assert clip.lr.shape == (6, 32, 80, 3)
    found = ladder.scores_of(clip.truth, clip)
    assert (found["psnr_db"], found["ssim"], found["tof_px"]) == (np.inf, 1.0, 0.0)


def test_own_clips_and_those_that_do_not_fit(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 144, 200, 3), np.uint8)
    end_to_end.write_clip(tmp_path / "a.mp4", frames)

    (clip,) = ladder.read_clips(tmp_path, 6)

    assert (clip.name, clip.truth.shape, clip.lr.shape) == ("a.mp4", (6, 64, 96, 3), (6, 16, 24, 3))
    with pytest.raises(PerfError, match=r"expected 16 frames in a\.mp4, found fewer"):
        ladder.read_clips(tmp_path, 16)
    with pytest.raises(PerfError, match="expected a folder of clips at"):
        ladder.read_clips(tmp_path / "none", 6)


def test_every_round_of_a_row_follows_one_of_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slows down by half between the rounds: fps do, the ratio does not."""
    order: list[str] = []

    def eager(function: Any, weights: Path, windows: Any, least_s: float) -> Any:
        order.append("baseline")
        return None, {"fps": 2.0 / order.count("baseline"), "memory_mb": 9.0}

    def measure(load: Load) -> dict[str, Any]:
        order.append("row")
        return {"fps": 10.0 / order.count("row"), "requests": 100}

    @contextmanager
    def serve(source: Any, serving: Any) -> Iterator[Any]:
        yield SimpleNamespace(grpc_url="localhost:1"), SimpleNamespace(lap=dict)

    source = SimpleNamespace(load=lambda url, size: Load(url, "m", tmp_path, 1))
    monkeypatch.setattr(ladder, "in_process", eager)
    monkeypatch.setattr(ladder, "serve", serve)
    monkeypatch.setattr(ladder, "repository_of", lambda *_: source)
    analyzer = SimpleNamespace(warm_up=lambda load: None, measure=measure)
    monkeypatch.setattr(ladder, "find_analyzer", lambda: analyzer)
    monkeypatch.setattr(ladder, "Upscaler", lambda *_, **__: contextmanager(lambda: (yield None))())
    monkeypatch.setattr(ladder.Ladder, "scores", lambda self, upscale: {"psnr_db": 30.0})
    one = ladder.Ladder(tmp_path, tmp_path, [], (16, 16), 2, 0.0, 4)
    first: dict[str, Any] = {"psnr_db": 30.5, "rounds": []}

    row = one.row(ladder.STEPS["student-int8"], first)

    assert order == ["baseline", "row"] * 2
    assert [one["fps"] / one["baseline_fps"] for one in row["rounds"]] == [5.0, 5.0]
    assert len(first["rounds"]) == 2
    assert row["loss_db"] == 0.5
    assert one.row(ladder.STEPS["pruned-fp16"], first)["why"] == "no GPU"


def test_the_ladder_refuses_unknown_rows() -> None:
    result = CliRunner().invoke(ladder.main, ["--rows", "pruned-int4"])

    assert result.exit_code == 1
    assert "found" in result.output


@pytest.mark.server
@pytest.mark.timeout(1200)  # two cores may be shared with other work
def test_make_measure_at_toy_size(toy_repository: Path, tmp_path: Path) -> None:
    try:
        find_analyzer()
    except PerfError as err:
        missing("PERF", str(err))
    served = ["--repository", str(toy_repository)]

    for command, more in (
        (sweep.main, served), (end_to_end.main, served), (ladder.main, served),
        (peers_main, ["MST-GAN, student"]),
    ):  # fmt: skip
        result = CliRunner().invoke(command, ["--quick", "--out", str(tmp_path), *more])
        assert result.exit_code == 0, result.output
    found = results.load_folder(tmp_path)
    drawn = CliRunner().invoke(report.main, ["--results", str(tmp_path), "--out", str(tmp_path)])

    assert drawn.exit_code == 0, drawn.output
    assert {result["kind"] for result in found.values()} == {*results.KINDS}
    for result in found.values():
        assert all(row["rounds"] for row in result["rows"]), result
    (point,) = found["concurrency"]["rows"]
    (one,) = point["rounds"]
    assert one["p50_ms"] <= one["p99_ms"]
    assert one["stages"]["generator"]["infer_ms"] > 0
    assert one["memory_mb"] > 50
    assert found["ladder"]["clips"] == ["bikes.mp4, 6 frames"]
    for command in ("perf.sweep", "perf.end_to_end", "perf.ladder", "perf.peers", "perf.report"):
        assert f"-m {command} $(if $(QUICK),--quick)" in (ROOT / "Makefile").read_text()
