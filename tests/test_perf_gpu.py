"""What measures a GPU, tried without one: counting, ceilings, the roofline, and rows that stay empty."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_network import TINY
from torch import nn

from export import spec
from export.network import MstGan, count
from perf import report, results, tools
from perf.errors import PerfError
from perf.gpu import __main__ as command
from perf.gpu import plans, roofline, served
from perf.gpu import rows as gpu_rows
from perf.gpu.roofline import Layer
from perf.gpu.table import gpu_sections
from perf.process import in_process

CEILINGS = {"FP32": 10.0, "FP16": 100.0, "copy": 8.0}


def test_layers_are_counted_as_pytorch_counts_them() -> None:
    found = roofline.our_layers(TINY, (32, 48), 2)

    assert sum(layer.flops for layer in found) == pytest.approx(2 * count(TINY, (32, 48))[1])


def test_a_layer_reads_and_writes_its_tensors_once() -> None:
    (layer,) = roofline.layers(lambda: nn.Conv2d(3, 8, 3, padding=1), lambda: torch.zeros(1, 3, 10, 20))

    assert layer.flops == 2 * 200 * 8 * 3 * 9
    assert layer.elements == 3 * 200 + 8 * 3 * 9 + 8 + 8 * 200


def test_roofline_takes_the_nearer_ceiling_of_every_layer() -> None:
    arithmetic, memory = Layer(flops=100.0, elements=2.0), Layer(flops=1.0, elements=4.0)

    assert roofline.least_seconds([arithmetic], "FP32", CEILINGS) == 10.0  # 100 FLOP at 10 FLOP/s
    assert roofline.least_seconds([memory], "FP32", CEILINGS) == 2.0  # 16 bytes at 8 bytes/s
    assert roofline.least_seconds([arithmetic, memory], "FP16", CEILINGS) == 2.0  # 1 s each


def test_ceilings_of_this_processor() -> None:
    found = roofline.measure_ceilings("cpu", side=64, copy_bytes=2**16, repeats=2)

    assert set(found) == {"FP32", "copy"}
    assert min(found.values()) > 1e6


class FakeRunner:
    """Answers as a stage does, on the CPU."""

    def __init__(self, stage: nn.Module, outputs: tuple[Any, ...]) -> None:
        self.stage, self.names = stage, [tensor.name for tensor in outputs]

    def infer(self, feed_dict: Mapping[str, Any], copy_outputs_to_host: bool) -> Mapping[str, Any]:
        assert not copy_outputs_to_host
        with torch.no_grad():
            found = self.stage(*feed_dict.values())
        return dict(zip(self.names, found if isinstance(found, tuple) else (found,), strict=True))


def test_plans_are_chained_as_the_ensemble_is() -> None:
    network = MstGan(TINY)
    runners = [FakeRunner(getattr(network, stage.name), stage.outputs) for stage in spec.STAGES]
    window = torch.zeros(1, 3, 16, 20, 3, dtype=torch.uint8)

    assert len(plans.time_chain(runners, window, rounds=2)) == 2


def test_without_plans_the_row_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match=r"no flow_align.plan in .*tensorrt_rtx.*`python -m export plans"):
        plans.find_library(tmp_path, "fp16")


def test_plans_of_an_installed_library_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx").mkdir()
    for path in plans.plan_paths(tmp_path / "tensorrt_rtx", "int8"):
        path.touch()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", SimpleNamespace())

    assert plans.find_library(tmp_path, "int8") == "tensorrt_rtx"


def test_a_target_that_is_not_built_says_so(toy_repository: Path) -> None:
    with pytest.raises(PerfError, match=r"model.plan, found no such file: run `make export` for this target"):
        served.measure_served("tensorrt", (16, 16), 1, 5.0, toy_repository)


@pytest.mark.server
def test_what_is_served_is_measured_by_perf_analyzer(toy_repository: Path) -> None:
    try:
        tools.find_analyzer()
    except PerfError as err:
        if os.environ.get("REQUIRE_PERF"):
            raise
        pytest.skip(str(err))

    # A target that no model has a configuration for is served as config.pbtxt says.
    fps, memory_mb = served.measure_served("default", (32, 48), 2, 60.0, toy_repository, frames=4)

    assert len(fps) == 2
    assert min(fps) > 0
    assert memory_mb is None or memory_mb >= 0


def test_a_row_that_fails_or_comes_too_late_says_why() -> None:
    def fail(size: Any, device: str, timeout_s: float) -> Any:
        raise PerfError("no such library")

    row = gpu_rows.Row("k", "n", "pruned", "FP32", 1, fail)

    assert command.measured_row(row, (16, 16), "cpu", {}, 100.0)["why"] == "no such library"
    assert command.measured_row(row, (16, 16), "cpu", {}, 1.0)["why"] == "the time of this run was over"


def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    """The same code runs as on a GPU, on a frame of 16x24."""
    arguments = ["--device", "cpu", "--size", "16", "24", "--only", "pytorch-fp32-pruned"]

    result = CliRunner().invoke(command.main, [*arguments, "--only", "plans-fp16", "--out", str(tmp_path)])

    assert result.exit_code == 0, result.output
    eager, plan = results.load(tmp_path / "gpu.json")["rows"]
    assert len(eager["fps_rounds"]) > 1
    assert eager["bound_fps"] > 0
    assert eager["flops_per_frame"] == pytest.approx(count(gpu_rows.PRUNED, (16, 24))[1])
    assert "export plans" in plan["why"]


def test_without_a_gpu_the_command_is_refused_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(command.main, [])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected a GPU that PyTorch ")
    assert result.output.count("\n") == 1


def test_unknown_row_is_one_line() -> None:
    result = CliRunner().invoke(command.main, ["--only", "nonsense"])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected rows among pytorch-fp32-pruned, ")


def gpu_result() -> dict[str, Any]:
    machine = results.load(Path(__file__).parent / "perf_results/load.json")["machine"]
    row = {"key": "k", "name": "PyTorch FP16, pruned", "network": "pruned", "precision": "FP16", "batch": 1}
    done = {
        "fps_rounds": [49.0, 50.0, 51.0],
        "bound_fps": 200.0,
        "flops_per_frame": 36e9,
        "bytes_per_frame": 3e8,
    }
    empty = {"fps_rounds": [], "bound_fps": None, "peak_gpu_memory_mb": None, "why": "no plans"}
    return {
        "kind": "gpu", "name": "gpu", "machine": {**machine, "gpu": "Test GPU"}, "device": "cuda",
        "ceilings": {"FP16": 5e14, "copy": 2e12}, "minutes": 10,
        "rows": [
            {**row, **done, "size": [180, 320], "peak_gpu_memory_mb": 600.0},
            {**row, **empty, "name": "plans INT8", "size": [180, 320]},
            {**row, **done, "size": [720, 1280], "peak_gpu_memory_mb": None},
        ],
    }  # fmt: skip


def test_the_report_shows_each_size_the_distance_and_the_reason(tmp_path: Path) -> None:
    small, large = gpu_sections(gpu_result())

    assert small.table and large.table and small.plot
    assert small.table.rows[0] == (
        "PyTorch FP16, pruned", "FP16", "36.0", "300", "20.00", "50.0 (49.0-51.0)", "200.0", "25%", "600"
    )  # fmt: skip
    assert small.table.rows[1][2:] == ("-",) * 7
    assert "plans INT8: not measured, no plans." in small.text
    assert "FP16 500.00 TFLOP/s, copy 2.00 TB/s" in small.text[0]
    assert "1280x720" in large.title
    results.write(tmp_path, gpu_result())
    assert (
        CliRunner().invoke(report.main, ["--results", str(tmp_path), "--out", str(tmp_path)]).exit_code == 0
    )
    assert "Test GPU" in (tmp_path / "REPORT.md").read_text()


def test_what_a_process_of_its_own_does_comes_back() -> None:
    assert in_process(abs, -3) == 3
    with pytest.raises(PerfError, match="ValueError: invalid literal"):
        in_process(int, "x")
    with pytest.raises(PerfError, match="status 7: too little memory"):
        in_process(_end)
    with pytest.raises(PerfError, match="not done in 1 s"):
        in_process(_sleep, timeout_s=1)


def _end() -> None:
    os._exit(7)


def _sleep() -> None:
    time.sleep(60)
