"""Plans, compiled for real by TensorRT-RTX without a GPU; and the refusal of what does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_quantize import feeds, psnr_db, run
from tiny_network import run_build

from export import plan, rungs, spec
from export.checkpoint import load_checkpoint
from export.errors import ExportError
from export.gates import Verdict
from export.onnx_export import stage_path
from export.plan import Identity, build_plan, check_plan, identity_path
from export.sample import calibration_windows

RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def graphs(
    built: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Verdict]]:
    folder = tmp_path_factory.mktemp("tensorrt")
    stages = {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}
    verdicts = rungs.build_for_tensorrt(
        load_checkpoint(checkpoint), stages, folder, calibration_windows()[-2:]
    )
    return folder, verdicts


def small_profiles(name: str) -> list[plan.Profile]:
    """A range of sizes that does not end where the flow's pyramid grows by a granule."""
    stage = next(stage for stage in spec.STAGES if stage.name == name)
    return plan.stage_profiles(stage, (1, 2, 4), ((16, 16), (20, 36), (68, 160)))


@pytest.mark.parametrize("name", rungs.PLANS)
def test_every_stage_compiles(graphs: tuple[Path, list[Verdict]], tmp_path: Path, name: str) -> None:
    source, target = graphs[0] / f"{name}.onnx", tmp_path / f"{name}.plan"
    profiles = small_profiles(name.split(".")[0])

    build_plan(RTX, source, target, profiles, ["8.6"])

    assert target.stat().st_size > 10_000
    identity = json.loads(identity_path(target).read_text())
    assert identity["library"] == RTX and identity["gpus"] == ["8.6"]
    assert len(identity["profiles"]) == (3 if name == "flow_align" else 1)
    check_plan(RTX, source, target, profiles, ["8.6"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".plan"]


def test_both_precisions_pass_their_gates(graphs: tuple[Path, list[Verdict]]) -> None:
    assert [verdict.rung for verdict in graphs[1]] == ["fp16", "int8"]
    assert [verdict.failures for verdict in graphs[1]] == [[], []]


def test_int8_is_symmetric_signed_with_float_biases(graphs: tuple[Path, list[Verdict]]) -> None:
    graph = onnx.load(graphs[0] / "generator.int8.onnx").graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
            assert (values[node.input[1]] > 0).all()
        if node.op_type == "Conv" and len(node.input) == 3:
            assert values[node.input[2]].dtype == np.float16
    dequantised = {name for name, node in producers.items() if node.op_type == "DequantizeLinear"}
    sums = [n for n in graph.node if n.op_type == "Add" and dequantised.issuperset(n.input)]
    assert len(sums) == 4 + 3 + 1 + 1  # both inputs, the skip's too


def test_frames_are_cast_at_the_edge(built: Path, graphs: tuple[Path, list[Verdict]]) -> None:
    for stage in (spec.FLOW_ALIGN, spec.PIXEL_SHUFFLE):
        before, after = stage_path(built / "build", stage), graphs[0] / f"{stage.name}.onnx"
        types = {v.type.tensor_type.elem_type for v in onnx.load(after).graph.value_info}
        assert TensorProto.UINT8 not in types
        inputs = feeds((20, 36))
        inputs["subpixels"] = np.random.default_rng(0).random((1, 48, 20, 36), np.float32)
        inputs = {tensor.name: inputs[tensor.name] for tensor in stage.inputs}
        assert np.array_equal(run(after, inputs), run(before, inputs))


def test_int8_answers_on_noise(built: Path, graphs: tuple[Path, list[Verdict]]) -> None:
    inputs = feeds((20, 36))
    fp32 = run(built / "build/generator.onnx", inputs)
    assert psnr_db(run(graphs[0] / "generator.int8.onnx", inputs), fp32) > 40


def test_a_refused_operator_is_named(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    bits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node("Bernoulli", ["x"], ["y"], "dice")], "g", [value], [bits])
    source = tmp_path / "dice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), source)

    with pytest.raises(ExportError, match=r"tensorrt_rtx 1\S+ refuses Bernoulli 'dice': .+; express it"):
        build_plan(RTX, source, tmp_path / "dice.plan", [{"x": [(1,), (2,), (3,)]}])
    assert not (tmp_path / "dice.plan").exists()


@pytest.fixture
def fitting(tmp_path: Path) -> tuple[Path, Path, list[plan.Profile]]:
    """Source, plan and profile that fit; the plan's content plays no part."""
    source, target = tmp_path / "s.onnx", tmp_path / "s.plan"
    source.write_bytes(b"graph")
    target.write_bytes(b"plan")
    profiles = [{"x": [(1, 2), (3, 4), (5, 6)]}]
    identity = plan._identity(plan.load_library(RTX), RTX, source, profiles, ["8.9"])
    identity_path(target).write_text(json.dumps(asdict(identity)))
    check_plan(RTX, source, target, profiles, ["8.9"])
    return source, target, profiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1.0.0"}, r"expected version 1\.\S+, found 1\.0\.0"),
        ({"gpus": ["7.5"]}, r"expected gpus \['8\.9'\], found \['7\.5'\]"),
        ({"onnx_sha256": "0"}, "expected onnx_sha256 .*, found 0"),
        ({"profiles": []}, r"expected profiles .*, found \[\]"),
        ({"library": "tensorrt"}, "expected library tensorrt_rtx, found tensorrt"),
    ],
)
def test_a_stale_plan_is_refused(
    fitting: tuple[Path, Path, list[plan.Profile]], change: dict, message: str
) -> None:
    source, target, profiles = fitting
    found = json.loads(identity_path(target).read_text())
    identity_path(target).write_text(json.dumps(asdict(Identity(**{**found, **change}))))
    with pytest.raises(ExportError, match=f"{message}; rebuild it with `python -m export plans --library"):
        check_plan(RTX, source, target, profiles, ["8.9"])


def test_a_plan_without_identity_is_refused(fitting: tuple[Path, Path, list[plan.Profile]]) -> None:
    source, target, profiles = fitting
    identity_path(target).write_text("{")
    with pytest.raises(ExportError, match="rebuild it"):
        check_plan(RTX, source, target, profiles, ["8.9"])
    identity_path(target).unlink()
    with pytest.raises(ExportError, match="found none; rebuild it"):
        check_plan(RTX, source, target, profiles, ["8.9"])


def test_an_older_exports_graph_is_refused(graphs: tuple[Path, list[Verdict]], tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"other weights")
    with pytest.raises(ExportError, match="comes from an older export"):
        rungs.check_parent(graphs[0] / "generator.int8.onnx", tmp_path / "other.onnx")


def test_unknown_gpu_and_library(graphs: tuple[Path, list[Verdict]], tmp_path: Path) -> None:
    source = graphs[0] / "pixel_shuffle.onnx"
    with pytest.raises(ExportError, match=r"expected a compute capability of .*8\.6.*, found '9.9'"):
        build_plan(RTX, source, tmp_path / "x.plan", small_profiles("pixel_shuffle"), ["9.9"])
    with pytest.raises(
        ExportError, match="expected one of the libraries tensorrt, tensorrt_rtx, found 'onnx'"
    ):
        build_plan("onnx", source, tmp_path / "x.plan", [])


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.LIBRARIES, RTX, "no_such_tensorrt")
    with pytest.raises(ExportError, match=r"expected tensorrt_rtx to be installed.*pip install"):
        build_plan(RTX, tmp_path / "x.onnx", tmp_path / "x.plan", [])


def test_tensorrt_builds_for_the_gpu_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "compute_capabilities", list)
    with pytest.raises(ExportError, match=r"expected an NVIDIA GPU.*--library tensorrt_rtx builds"):
        build_plan("tensorrt", tmp_path / "x.onnx", tmp_path / "x.plan", [])
    monkeypatch.setattr(plan, "compute_capabilities", lambda: ["9.0", "8.9"])
    assert plan._targets("tensorrt", []) == ["9.0"]
    with pytest.raises(ExportError, match=r"expected no --gpu, .* \(9.0\), found 8.6"):
        build_plan("tensorrt", tmp_path / "x.onnx", tmp_path / "x.plan", [], ["8.6"])


def test_tensorrt_target_says_what_can_be_built_here(checkpoint: Path, tmp_path: Path) -> None:
    result = run_build(checkpoint, tmp_path, "--target", "tensorrt")
    assert result.exit_code == 1
    assert "python -m export plans" in result.output
    assert "--target cpu" in result.output
    assert result.output.count("\n") == 1
