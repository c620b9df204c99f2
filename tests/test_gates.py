"""Gates: a rung is judged against its parent on real frames, and only a good one reaches the repository."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_network import run_build

from export import gates, onnx_export, rungs, spec
from export.gates import Verdict, judge_generator
from export.metrics.tof import flows, tof
from export.repository import stage_path


@pytest.fixture(scope="module")
def stages(built: Path) -> dict[str, Path]:
    return {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}


@pytest.fixture(scope="module")
def verdict(stages: dict[str, Path], built: Path) -> Verdict:
    return judge_generator("int8", built / "build/generator.int8.onnx", "fp32", stages, judge_speed=True)


@pytest.fixture
def prepared(built: Path, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an older export, in which a build skips what takes long."""
    shutil.copytree(built / "models", tmp_path / "models")
    shutil.copytree(built / "build", tmp_path / "build")
    int8 = onnx.load(built / "build/generator.int8.onnx")
    monkeypatch.setattr(onnx_export, "export_onnx", lambda network, folder: stages)
    monkeypatch.setattr(rungs, "_int8_for_cpu", lambda *_: int8)
    return tmp_path


def test_int8_passes_on_real_frames(verdict: Verdict) -> None:
    assert verdict.failures == []
    assert 20 < verdict.psnr_db < 60
    assert 0 < verdict.max_error <= 16
    assert verdict.tof_px > 0
    assert verdict.ms is not None and verdict.speedup is not None


def test_a_damaged_generator_fails_by_name_and_number(stages: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(stages["generator"])
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "tail.bias")
    flicker = np.tile(np.array([0.2, -0.2], np.float32), 24)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + flicker, "tail.bias"))
    onnx.save(model, tmp_path / "damaged.onnx")

    verdict = judge_generator("int8", tmp_path / "damaged.onnx", "fp32", stages, judge_speed=False)

    assert verdict.psnr_loss_db > 1
    assert verdict.max_error > 40
    assert verdict.tof_gain_px > 0
    assert verdict.failures[0] == f"loses {verdict.psnr_loss_db:.3f} dB (at most 0.1)"
    assert verdict.failures[1].startswith("differs by up to ")
    assert verdict.ms is None and verdict.fast_enough


def test_a_limit_that_is_not_a_number_fails(verdict: Verdict) -> None:
    assert len(replace(verdict, psnr_loss_db=float("nan")).failures) == 1


def test_flicker_is_seen_where_single_frames_are_as_good(stages: dict[str, Path]) -> None:
    """Every second frame shifted by a pixel: its PSNR falls with the shift, its flow is off by the shift."""
    _, truth = gates.reduced_windows(gates.SPOTS[1], 4)
    shaken = truth.copy()
    shaken[1::2] = np.roll(shaken[1::2], 1, axis=2)
    assert tof(truth, flows(truth)) == 0
    assert tof(shaken, flows(truth)) > 0.2


def test_a_good_build_reports_and_serves_int8(built: Path) -> None:
    report = json.loads((built / "build/parity.json").read_text())
    (row,) = report["rungs"]
    assert (row["stage"], row["rung"], row["parent"]) == ("generator", "int8", "fp32")
    assert row["passed"] and row["fast_enough"]
    assert row["limits"]["psnr_loss_db"] == 0.1
    version = built / "models/generator/1"
    assert sorted(path.name for path in version.iterdir()) == [
        "model.fp32.onnx", "model.int8.onnx", "model.onnx",
    ]  # fmt: skip
    assert (version / "model.onnx").read_bytes() == (version / "model.int8.onnx").read_bytes()


def test_a_lossy_rung_is_not_installed(
    prepared: Path, checkpoint: Path, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy = replace(verdict, psnr_loss_db=0.234)
    monkeypatch.setattr(rungs, "judge_generator", lambda *_, **__: lossy)
    (prepared / "models/generator/1/model.onnx").write_bytes(b"old")

    result = run_build(checkpoint, prepared, "--target", "cpu")

    assert result.exit_code == 1
    assert "generator in int8 loses 0.234 dB (at most 0.1)" in result.output
    assert (prepared / "models/generator/1/model.onnx").read_bytes() == b"old"
    assert not json.loads((prepared / "build/parity.json").read_text())["rungs"][0]["passed"]


def test_a_slow_rung_is_not_promoted(
    prepared: Path,
    checkpoint: Path,
    verdict: Verdict,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = replace(verdict, speedup=0.9)
    monkeypatch.setattr(rungs, "judge_generator", lambda *_, **__: slow)

    result = run_build(checkpoint, prepared, "--target", "cpu")

    assert result.exit_code == 0, result.output
    assert "generator in int8 is not promoted" in caplog.text
    version = prepared / "models/generator/1"
    assert (version / "model.onnx").read_bytes() == (version / "model.fp32.onnx").read_bytes()


def test_fp32_is_a_target(prepared: Path, checkpoint: Path) -> None:
    assert run_build(checkpoint, prepared, "--target", "fp32").exit_code == 0
    version = prepared / "models/generator/1"
    assert (version / "model.onnx").read_bytes() == (version / "model.fp32.onnx").read_bytes()


def test_unknown_target(checkpoint: Path, tmp_path: Path) -> None:
    result = run_build(checkpoint, tmp_path, "--target", "tpu")
    assert result.exit_code == 1
    assert result.output.startswith("Error: expected --target to be one of cpu, ")
    assert result.output.count("\n") == 1


def test_bad_calibration_folder_stops_before_the_export(checkpoint: Path, tmp_path: Path) -> None:
    result = run_build(checkpoint, tmp_path, "--calibration", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "expected videos to calibrate on" in result.output
    assert not (tmp_path / "build").exists()
