"""Plans, compiled for real by TensorRT-RTX without a GPU; and the refusal of what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_sessions import feeds, run
from tiny_network import run_build

from export import spec, targets
from export.checkpoint import FOLDER, load_checkpoint
from export.data.sample import calibration_windows
from export.errors import ExportError
from export.onnx import export as onnx_export
from export.onnx.fp16 import to_fp16
from export.onnx.int8 import TENSORRT_WEIGHT_LEVEL
from export.onnx.rounding import with_weights
from export.onnx.tensorrt import quantize_for_tensorrt, tensorrt_graph
from export.repository import sha256, stage_path
from export.tensorrt import plan
from export.tensorrt.plan import Identity, build_plan, check_plan, identity_path
from export.verify import compare
from export.verify.compare import Comparison, Report, psnr_db

pytestmark = pytest.mark.slow

RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def graphs(
    built: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Comparison]]:
    folder = tmp_path_factory.mktemp("tensorrt")
    stages = {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}
    comparisons = targets.build_for_tensorrt(
        load_checkpoint(checkpoint), stages, folder, calibration_windows()[1:]
    )
    return folder, comparisons


def small_profile(name: str) -> plan.Profile:
    """A range of sizes that does not end where the flow's pyramid grows by a multiple."""
    stage = next(stage for stage in spec.STAGES if stage.name == name)
    return plan.stage_profile(stage, (1, 2, 4), ((16, 16), (20, 36), (68, 160)))


@pytest.mark.parametrize("name", targets.PLANS)
def test_every_stage_compiles(graphs: tuple[Path, list[Comparison]], tmp_path: Path, name: str) -> None:
    source, target = graphs[0] / f"{name}.onnx", tmp_path / f"{name}.plan"
    profile = small_profile(name.split(".")[0])

    build_plan(RTX, source, target, profile, ["8.6"])

    assert target.stat().st_size > 10_000
    identity = json.loads(identity_path(target).read_text())
    assert identity["library"] == RTX and identity["gpus"] == ["8.6"]
    assert identity["profile"].keys() == set(profile)
    check_plan(RTX, source, target, profile, ["8.6"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".plan"]


def test_both_precisions_keep_the_answer(graphs: tuple[Path, list[Comparison]]) -> None:
    assert [one.precision for one in graphs[1]] == ["fp16", "int8"]
    fp16, int8 = graphs[1]
    assert not fp16.failures
    assert int8.measured["psnr_loss_db"] < 1  # of random weights


def test_int8_is_symmetric_signed_with_float_biases(graphs: tuple[Path, list[Comparison]]) -> None:
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
    dequantized = {name for name, node in producers.items() if node.op_type == "DequantizeLinear"}
    sums = [n for n in graph.node if n.op_type == "Add" and dequantized.issuperset(n.input)]
    assert len(sums) == 4 + 3 + 1 + 1  # both inputs, the skip's too


def test_bytes_are_cast_at_the_edge(built: Path, graphs: tuple[Path, list[Comparison]]) -> None:
    for stage in (spec.FLOW_ALIGN, spec.PIXEL_SHUFFLE):
        before, after = stage_path(built / "build", stage), graphs[0] / f"{stage.name}.onnx"
        types = {v.type.tensor_type.elem_type for v in onnx.load(after).graph.value_info}
        assert TensorProto.UINT8 not in types
        inputs = feeds((20, 36))
        shape = spec.SUBPIXELS.shape(1, (20, 36))
        inputs["subpixels"] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        inputs = {tensor.name: inputs[tensor.name] for tensor in stage.inputs}
        assert np.array_equal(run(after, inputs), run(before, inputs))


def test_int8_of_trained_weights_answers_as_fp32(built: Path, tmp_path: Path) -> None:
    network = load_checkpoint(FOLDER / "mst_gan_student.safetensors")
    fp32 = tmp_path / "generator.onnx"
    onnx_export.export_stage(network.generator, spec.GENERATOR, fp32)
    unseen, *calibration = calibration_windows()
    graph = tensorrt_graph(onnx.load(fp32))
    ranges, weights = targets.quantized(network, graph, calibration, TENSORRT_WEIGHT_LEVEL)
    int8 = to_fp16(quantize_for_tensorrt(with_weights(graph, weights), ranges))

    tensors = compare.onnx_runner(stage_path(built / "build", spec.FLOW_ALIGN))({"lr_window": unseen})
    inputs = {"lr_window": unseen, **tensors}
    assert psnr_db(run(int8, inputs), run(fp32, inputs), peak=255) > 48


def test_a_refused_operator_is_named(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    bits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([helper.make_node("Bernoulli", ["x"], ["y"], "dice")], "g", [value], [bits])
    source = tmp_path / "dice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), source)

    with pytest.raises(ExportError) as caught:
        build_plan(RTX, source, tmp_path / "dice.plan", {"x": [(1,), (2,), (3,)]})
    version = plan.load_library(RTX).__version__
    assert str(caught.value) == (
        f"{source}: tensorrt_rtx {version} refuses Bernoulli 'dice': UNSUPPORTED_NODE: false; "
        "express it otherwise"
    )
    assert not (tmp_path / "dice.plan").exists()


@pytest.fixture
def fitting(tmp_path: Path) -> tuple[Path, Path, plan.Profile]:
    """Source, plan and profile that fit; the plan's content plays no part."""
    source, target = tmp_path / "s.onnx", tmp_path / "s.plan"
    onnx.save(onnx.ModelProto(ir_version=8), source)
    target.write_bytes(b"plan")
    profile = {"x": [(1, 2), (3, 4), (5, 6)]}
    identity = plan._identity(plan.load_library(RTX), RTX, source, profile, ["8.9"])
    identity_path(target).write_text(json.dumps(asdict(identity)))
    check_plan(RTX, source, target, profile, ["8.9"])
    return source, target, profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1.0.0"}, r"expected version 1\.\S+, found 1\.0\.0"),
        ({"gpus": ["7.5"]}, r"expected gpus \['8\.9'\], found \['7\.5'\]"),
        ({"onnx_sha256": "0"}, "expected onnx_sha256 .*, found 0"),
        ({"profile": {}}, r"expected profile .*, found {}"),
        ({"library": "tensorrt"}, "expected library tensorrt_rtx, found tensorrt"),
    ],
)
def test_a_stale_plan_is_refused(
    fitting: tuple[Path, Path, plan.Profile], change: dict, message: str
) -> None:
    source, target, profile = fitting
    found = json.loads(identity_path(target).read_text())
    identity_path(target).write_text(json.dumps(asdict(Identity(**{**found, **change}))))
    with pytest.raises(ExportError, match=f"{message}; rebuild it with `python -m export plans --library"):
        check_plan(RTX, source, target, profile, ["8.9"])


def test_a_plan_without_identity_is_refused(fitting: tuple[Path, Path, plan.Profile]) -> None:
    source, target, profile = fitting
    identity_path(target).write_text("{")
    with pytest.raises(ExportError, match="rebuild it"):
        check_plan(RTX, source, target, profile, ["8.9"])
    identity_path(target).unlink()
    with pytest.raises(ExportError, match="found none; rebuild it"):
        check_plan(RTX, source, target, profile, ["8.9"])


def test_an_older_exports_graph_is_refused(graphs: tuple[Path, list[Comparison]], tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"other weights")
    with pytest.raises(ExportError, match="comes from an older export"):
        targets.check_parent(graphs[0] / "generator.int8.onnx", tmp_path / "other.onnx")


def test_unknown_gpu_and_library(graphs: tuple[Path, list[Comparison]], tmp_path: Path) -> None:
    source = graphs[0] / "pixel_shuffle.onnx"
    with pytest.raises(ExportError, match=r"expected a compute capability of .*8\.6.*, found '9.9'"):
        build_plan(RTX, source, tmp_path / "x.plan", small_profile("pixel_shuffle"), ["9.9"])
    with pytest.raises(
        ExportError, match="expected one of the libraries tensorrt, tensorrt_rtx, found 'onnx'"
    ):
        build_plan("onnx", source, tmp_path / "x.plan", {})


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.LIBRARIES, RTX, "no_such_tensorrt")
    with pytest.raises(ExportError, match=r"expected tensorrt_rtx to be installed.*pip install"):
        build_plan(RTX, tmp_path / "x.onnx", tmp_path / "x.plan", {})


def test_tensorrt_builds_for_the_gpu_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "compute_capabilities", list)
    with pytest.raises(ExportError, match=r"expected an NVIDIA GPU.*--library tensorrt_rtx builds"):
        build_plan("tensorrt", tmp_path / "x.onnx", tmp_path / "x.plan", {})
    monkeypatch.setattr(plan, "compute_capabilities", lambda: ["9.0", "8.9"])
    assert plan._targets("tensorrt", []) == ["9.0"]
    with pytest.raises(ExportError, match=r"expected no --gpu, .* \(9.0\), found 8.6"):
        build_plan("tensorrt", tmp_path / "x.onnx", tmp_path / "x.plan", {}, ["8.6"])


def test_tensorrt_target_says_what_can_be_built_here(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "compute_capabilities", list)
    result = run_build(checkpoint, tmp_path, "--target", "tensorrt")
    assert result.exit_code == 1
    assert result.output == (
        "Error: expected an NVIDIA GPU for --target tensorrt, which builds plans on the GPU that runs them, "
        "found none; what can be built here: plans for TensorRT-RTX by `make plans`, or ONNX files for GPUs "
        "by `make export TARGET=cuda`\n"
    )


def test_tensorrt_target_wants_the_library(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "compute_capabilities", lambda: ["8.9"])
    monkeypatch.setitem(plan.LIBRARIES, "tensorrt", "no_such_tensorrt")
    result = run_build(checkpoint, tmp_path, "--target", "tensorrt")
    assert result.exit_code == 1
    assert result.output == (
        "Error: expected tensorrt to be installed, found none (No module named 'no_such_tensorrt'): "
        "use NVIDIA's container, or install TensorRT from NVIDIA's package index\n"
    )


def test_a_second_library_in_one_process_is_refused() -> None:
    plan.point_polygraphy_at(RTX, plan.load_library(RTX))
    import polygraphy.backend.trt.loader  # noqa: F401

    with pytest.raises(ExportError, match="expected one library per process, found tensorrt after another"):
        plan.point_polygraphy_at("tensorrt", plan.load_library(RTX))


STAND_IN = """
import sys, types, json
import numpy as np
from pathlib import Path

import tensorrt_rtx_bindings as rtx

fake = types.ModuleType("tensorrt")  # TensorRT-RTX in TensorRT's clothes: the real one needs a GPU
vars(fake).update({k: v for k, v in vars(rtx).items() if k != "__name__"}, __version__="11.0.0")
sys.modules["tensorrt"] = fake

from click.testing import CliRunner
from export import spec, targets
from export.__main__ import main
from export.data import sample
from export.onnx import export as onnx_export
from export.tensorrt import plan
from export.verify import compare
from export.network import WIDTHS
from export.repository import sha256, stage_path
from tiny_network import TINY, run_build

checkpoint, built, out = map(Path, sys.argv[1:4])
int8_ms = float(sys.argv[4])
WIDTHS[TINY.name] = TINY
compare.compare_stages = lambda *_: []
import export.tensorrt.gpus
committed = compare.tolerances  # for trained weights; these are random
loose = {"psnr_loss_db": 1.0, "tof_gain_px": 0.5}
compare.tolerances = lambda *keys: committed(*keys) | (loose if keys[0] == "precisions" else {})
for module in (export.tensorrt.gpus, plan, targets):
    module.compute_capabilities = lambda: ["8.9"]
stages = {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}
onnx_export.export_onnx = lambda network, folder: stages
import shutil
(out / "build").mkdir(parents=True)
for path in stages.values():
    shutil.copy(path, out / "build")

compare.USUAL_SIZE, compare.SPOTS = (36, 52), compare.SPOTS[:1]
windows = sample.calibration_windows()[-2:]
sample.calibration_windows = lambda folder: windows

def run_plan(library, plan, inputs):
    answers = compare.onnx_runner(plan.with_suffix(".onnx"))(inputs)
    return answers, int8_ms if "int8" in plan.name else 1.0

compare.run_plan = run_plan
result = run_build(checkpoint, out, "--target", "tensorrt", "--speed-gate")
sys.stdout.write(result.output)
sys.exit(result.exit_code)
"""


def build_with_stand_in(
    checkpoint: Path, built: Path, out: Path, int8_ms: float
) -> subprocess.CompletedProcess[str]:
    """The command with TensorRT-RTX in TensorRT's place; another process, as Polygraphy takes one library."""
    return subprocess.run(
        [sys.executable, "-c", STAND_IN, *map(str, (checkpoint, built, out, int8_ms))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}"},
        text=True, capture_output=True,
    )  # fmt: skip


def test_tensorrt_target_installs_plans_for_the_gpu_at_hand(
    checkpoint: Path, built: Path, tmp_path: Path
) -> None:
    result = build_with_stand_in(checkpoint, built, tmp_path, int8_ms=0.5)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "holds plans, the generator's in int8" in result.stdout
    assert "--model-config-name=tensorrt" in result.stdout
    graphs = tmp_path / "build/tensorrt"
    for stage in spec.STAGES:
        version = tmp_path / "models" / stage.name / "1"
        name = "generator.int8" if stage == spec.GENERATOR else stage.name
        assert (version / "model.sm89.plan").read_bytes() == (graphs / f"{name}.plan").read_bytes()
        identity = json.loads((version / "model.sm89.plan.json").read_text())
        assert identity["library"] == "tensorrt" and identity["version"] == "11.0.0"
        assert identity["gpus"] == ["8.9"]
        assert identity["onnx_sha256"] == sha256(graphs / f"{name}.onnx")
        assert identity["fp32_sha256"] == sha256(version / "model.onnx")
        assert identity["profile"] == {
            tensor.name: [
                list(tensor.shape(n, size)) for n, size in zip(spec.BATCHES, spec.LR_SIZES, strict=True)
            ]
            for tensor in stage.inputs
        }
    assert (graphs / "timing.cache").is_file()
    rows = json.loads((tmp_path / "build/parity.json").read_text())["plans"]
    assert [row["precision"] for row in rows] == ["fp16", "int8"]


@pytest.fixture
def stand_in_plans(
    graphs: tuple[Path, list[Comparison]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Comparison]]:
    """``compare_plans``, where each graph itself stands in for its plan."""
    sources = {name: graphs[0] / f"{name}.onnx" for name in targets.PLANS}
    monkeypatch.setattr(compare, "USUAL_SIZE", (36, 52))

    def compared(noise: float, int8_ms: float, *, timed: bool = True) -> list[Comparison]:
        def run_plan(library: str, plan: Path, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
            answers = compare.onnx_runner(plan)(inputs)
            if "hr_frame" in answers:
                answers["hr_frame"] = np.clip(answers["hr_frame"] + noise, 0, 255)
            return answers, int8_ms if "int8" in plan.name else 1.0

        monkeypatch.setattr(compare, "run_plan", run_plan)
        return compare.compare_plans("tensorrt", sources, sources, timed=timed)

    return compared


def test_plans_that_answer_wrongly_are_an_error(
    stand_in_plans: Callable[..., list[Comparison]], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"plans do not answer as .*: plans in fp16 is 2\d.*at least 40"):
        Report(tmp_path).check("plans", stand_in_plans(noise=10, int8_ms=0.5))
    assert not json.loads((tmp_path / "parity.json").read_text())["plans"][1]["passed"]


@pytest.mark.parametrize(
    ("int8_ms", "timed", "selected"),
    [(0.5, True, True), (1.5, True, False), (1.5, False, True), (float("nan"), True, False)],
)
def test_int8_plans_are_selected_by_speed(
    stand_in_plans: Callable[..., list[Comparison]], int8_ms: float, timed: bool, selected: bool
) -> None:
    fp16, int8 = stand_in_plans(noise=0, int8_ms=int8_ms, timed=timed)
    assert not fp16.failures and not int8.failures
    assert fp16.fast_enough
    assert int8.fast_enough is selected
