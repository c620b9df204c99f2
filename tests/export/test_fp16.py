"""FP16 in the graph: what may lose precision does, positions do not, and the boundary keeps the contract."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_sessions import feeds, run
from tiny_network import run_build

from export import spec, targets
from export.onnx import export as onnx_export
from export.onnx.fp16 import to_fp16
from export.repository import generator_path, stage_path
from export.tensorrt.gpus import compute_capabilities
from export.verify.compare import compare_generator, psnr_db


@pytest.fixture(scope="module")
def stages(built: Path) -> dict[str, Path]:
    return {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}


@pytest.fixture(scope="module")
def fp32(built: Path) -> Path:
    return generator_path(built / "build", "fp32")


@pytest.fixture(scope="module")
def fp16(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "generator.fp16.onnx"
    onnx.save(to_fp16(onnx.load(fp32)), path)
    return path


def types_of(model: onnx.ModelProto, op_type: str, index: int = 0) -> set[int]:
    """Element types that the operator reads at one input."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)
    }
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return {types[node.input[index]] for node in inferred.node if node.op_type == op_type}


def test_convolutions_and_sums_are_fp16(fp16: Path) -> None:
    model = onnx.load(fp16)
    for op_type in ("Conv", "Relu", "DepthToSpace", "MaxPool"):
        assert types_of(model, op_type) == {TensorProto.FLOAT16}, op_type
    assert types_of(model, "Conv", 1) == {TensorProto.FLOAT16}


def test_flow_positions_and_sampling_are_fp32(fp16: Path) -> None:
    model = onnx.load(fp16)
    assert types_of(model, "GridSample") == types_of(model, "GridSample", 1) == {TensorProto.FLOAT}
    positions = [node.input[1] for node in model.graph.node if node.op_type == "GridSample"]
    assert spec.FLOW.name in ancestors(model, positions)
    assert not halves(model) & ancestors(model, positions)


def halves(model: onnx.ModelProto) -> set[str]:
    values = onnx.shape_inference.infer_shapes(model).graph.value_info
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16}


def ancestors(model: onnx.ModelProto, tensors: Iterable[str]) -> set[str]:
    found = set(tensors)
    for node in reversed(model.graph.node):
        if node.op_type != "Shape" and found.intersection(node.output):
            found.update(node.input)
    return found


def test_boundary_keeps_the_contract(fp32: Path, fp16: Path) -> None:
    before, after = onnx.load(fp32).graph, onnx.load(fp16).graph
    assert [v.type.tensor_type.elem_type for v in (*after.input, *after.output)] == [
        v.type.tensor_type.elem_type for v in (*before.input, *before.output)
    ]
    assert fp16.stat().st_size < 0.75 * fp32.stat().st_size


@pytest.mark.parametrize("lr_size", [(20, 36), (16, 1152), (1152, 16)])
def test_answers_stay_within_fp16(fp32: Path, fp16: Path, lr_size: spec.Size) -> None:
    inputs = feeds(lr_size)
    assert psnr_db(run(fp16, inputs), run(fp32, inputs), peak=255) > 60


def test_real_frames_lose_nothing(fp16: Path, stages: dict[str, Path]) -> None:
    compared = compare_generator("fp16", fp16, stages, timed=True)
    assert compared.failures == []
    assert compared.measured["psnr_loss_db"] < 0.01
    assert compared.ms is None  # nothing to time without FP16 kernels


def test_cuda_target_installs_fp16_beside_int8(
    built: Path, checkpoint: Path, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "export_onnx", lambda network, folder: stages)
    version = tmp_path / "models/generator/1"
    version.mkdir(parents=True)
    (version / "model.int8.onnx").write_bytes((built / "models/generator/1/model.int8.onnx").read_bytes())
    (tmp_path / "build").mkdir()
    for path in stages.values():
        (tmp_path / "build" / path.name).write_bytes(path.read_bytes())

    result = run_build(checkpoint, tmp_path, "--target", "cuda")

    assert result.exit_code == 0, result.output
    assert (version / "model.onnx").read_bytes() == (version / "model.fp16.onnx").read_bytes()
    assert (version / "model.int8.onnx").is_file()
    assert np.isfinite(run(version / "model.onnx", feeds((20, 36)))).all()


@pytest.mark.parametrize(
    ("status", "count", "gpus", "target"),
    [(0, 2, ["7.0", "7.1"], "cuda"), (0, 0, [], "cpu"), (100, 2, [], "cpu")],
)
def test_target_of_a_machine_with_a_driver(
    monkeypatch: pytest.MonkeyPatch, status: int, count: int, gpus: list[str], target: str
) -> None:
    def device_count(pointer: Any) -> int:
        pointer._obj.value = count
        return 0

    def device_attribute(pointer: Any, attribute: int, device: int) -> int:
        pointer._obj.value = {75: 7, 76: device}[attribute]
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: status, cuDeviceGetCount=device_count, cuDeviceGetAttribute=device_attribute
    )
    monkeypatch.setattr("export.tensorrt.gpus.ctypes.CDLL", lambda name: driver)
    assert compute_capabilities() == gpus
    assert targets.default_target() == target


def test_target_of_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("export.tensorrt.gpus.ctypes.CDLL", missing)
    assert targets.default_target() == "cpu"
