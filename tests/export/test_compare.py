"""Comparisons of exported stages with their references, on real frames; only good ones are installed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_network import run_build

from export import spec, targets
from export.checkpoint import load_checkpoint
from export.errors import ExportError
from export.metrics.tof import flows, tof
from export.onnx import export as onnx_export
from export.repository import stage_path
from export.verify import compare
from export.verify.compare import EQUAL_DB, Comparison, Report, compare_generator, compare_stages, psnr_db

pytestmark = pytest.mark.slow

LIMITS = {"psnr_db": 40.0, "max_error": 2.0}


@pytest.fixture(scope="module")
def stages(built: Path) -> dict[str, Path]:
    return {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}


@pytest.fixture(scope="module")
def int8(stages: dict[str, Path], built: Path) -> Comparison:
    return compare_generator("int8", built / "build/generator.int8.onnx", stages, timed=True)


@pytest.fixture
def prepared(built: Path, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an older export, in which a build skips what takes long."""
    shutil.copytree(built / "models", tmp_path / "models")
    shutil.copytree(built / "build", tmp_path / "build")
    int8 = onnx.load(built / "build/generator.int8.onnx")
    monkeypatch.setattr(onnx_export, "export_onnx", lambda network, folder: stages)
    monkeypatch.setattr(compare, "compare_stages", lambda *_: [])
    monkeypatch.setattr(targets, "int8_for_cpu", lambda *_: int8)
    return tmp_path


def test_psnr_of_a_known_error() -> None:
    reference = np.array([0, 255], np.uint8)
    assert psnr_db(reference, reference) == EQUAL_DB
    assert psnr_db(np.array([1, 254], np.uint8), reference) == pytest.approx(20 * math.log10(255))
    assert psnr_db(np.full(2, 1.0), np.full(2, 3.0), peak=200.0) == pytest.approx(40)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["found", "reference"])
def test_what_is_not_finite_is_never_close(value: float, side: str) -> None:
    finite, other = np.array([0.0, 1.0], np.float32), np.array([value, 1.0], np.float32)
    pair = (other, finite) if side == "found" else (finite, other)
    assert math.isnan(psnr_db(*pair))
    broken = Comparison("flow_align", "fp32", "PyTorch", {"psnr_db": psnr_db(*pair)}, LIMITS)
    assert broken.failures == ["is nan dB from its reference (at least 40)"]


@pytest.mark.parametrize("name", compare.WORDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_measure_passes_that_is_not_finite(name: str, value: float) -> None:
    limits = {name: -1e9 if name in compare.AT_LEAST else 1e9}
    assert len(Comparison("generator", "int8", "fp32", {name: value}, limits).failures) == 1


def test_a_speed_that_is_not_a_number_selects_nothing() -> None:
    timed = Comparison("generator", "int8", "fp32", {}, {}, speedup=math.nan, least_speedup=1.0)
    assert not timed.fast_enough


def test_int8_passes_on_real_frames(int8: Comparison) -> None:
    assert int8.failures == []
    assert int8.truth_psnr_db is not None and 20 < int8.truth_psnr_db < 60
    assert 0 < int8.measured["max_error"] <= 16
    assert int8.ms is not None and int8.speedup is not None


def test_a_damaged_generator_fails_by_name_and_number(stages: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(stages["generator"])
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    flicker = np.tile(np.array([0.2, -0.2], np.float32), 24)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + flicker, "head.bias"))
    onnx.save(model, tmp_path / "damaged.onnx")

    damaged = compare_generator("int8", tmp_path / "damaged.onnx", stages, timed=False)

    assert damaged.measured["psnr_loss_db"] > 1
    assert damaged.measured["max_error"] > 40
    assert damaged.measured["tof_gain_px"] > 0
    assert damaged.failures[0] == f"loses {damaged.measured['psnr_loss_db']:.3f} dB (at most 0.1)"
    assert damaged.failures[1].startswith("differs by up to ")
    assert damaged.ms is None and damaged.fast_enough


def test_parity_sees_a_wrong_weight(checkpoint: Path, stages: dict[str, Path]) -> None:
    network = load_checkpoint(checkpoint)
    network.generator.head.weight[0, 0, 1, 1] += 1
    failed = {row.stage for row in compare_stages(network, {"fp32": stages}) if row.failures}
    assert failed == {"generator", "mst_gan"}


def test_flicker_is_seen_where_single_frames_are_as_good() -> None:
    """Every second frame shifted by a pixel: its PSNR falls with the shift, its flow is off by the shift."""
    _, truth = compare.reduced_windows(110, 4)
    shaken = truth.copy()
    shaken[1::2] = np.roll(shaken[1::2], 1, axis=2)
    assert tof(truth, flows(truth)) == 0
    assert tof(shaken, flows(truth)) > 0.2


def test_a_report_has_all_sections_of_its_run_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text("of an older run")
    good = Comparison("flow_align", "fp32", "PyTorch", {"psnr_db": 60.0}, LIMITS, "flow", (1, 4, 5, 9))
    bad = replace(good, stage="plans", measured={"psnr_db": math.nan})
    report = Report(tmp_path)
    report.check("onnx", [good])
    with pytest.raises(
        ExportError, match=r"plans do not answer as their graphs do: plans.flow in fp32 is nan dB"
    ):
        report.check("plans", [bad])
    sections = json.loads((tmp_path / "parity.json").read_text())
    assert {name: [row["passed"] for row in rows] for name, rows in sections.items()} == {
        "onnx": [True], "plans": [False],
    }  # fmt: skip


def test_a_good_build_reports_and_serves_int8(built: Path) -> None:
    report = json.loads((built / "build/parity.json").read_text())
    (row,) = report["precisions"]
    assert (row["stage"], row["precision"], row["reference"]) == ("generator", "int8", "fp32")
    assert row["passed"] and row["fast_enough"]
    assert row["limits"]["psnr_loss_db"] == 0.1
    version = built / "models/generator/1"
    assert sorted(path.name for path in version.iterdir()) == [
        "model.fp32.onnx", "model.int8.onnx", "model.onnx",
    ]  # fmt: skip
    assert (version / "model.onnx").read_bytes() == (version / "model.int8.onnx").read_bytes()


def test_a_damaged_int8_is_not_installed(
    prepared: Path, checkpoint: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole command: the scale of one layer's weights is doubled."""
    model = onnx.load(built / "build/generator.int8.onnx")
    scale = next(t for t in model.graph.initializer if t.name == "head.weight_scale")
    scale.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scale), scale.name))
    monkeypatch.setattr(targets, "int8_for_cpu", lambda *_: model)
    (prepared / "models/generator/1/model.onnx").write_bytes(b"old")

    result = run_build(checkpoint, prepared, "--target", "cpu")

    assert result.exit_code == 1
    assert "a lower precision costs too much: generator in int8 loses" in result.output
    assert (prepared / "models/generator/1/model.onnx").read_bytes() == b"old"
    assert not json.loads((prepared / "build/parity.json").read_text())["precisions"][0]["passed"]


def test_a_slow_precision_is_rejected(
    prepared: Path,
    checkpoint: Path,
    int8: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = replace(int8, speedup=0.9)
    monkeypatch.setattr(targets, "compare_generator", lambda *_, **__: slow)

    result = run_build(checkpoint, prepared, "--target", "cpu")

    assert result.exit_code == 0, result.output
    assert "generator in int8 is rejected" in caplog.text
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
