"""Checkpoint to installed ONNX files: parity holds, and whatever goes wrong leaves the old files alone."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_network import LIGHT, TINY, run_build, shake

from export import spec
from export.__main__ import main
from export.checkpoint import DEFAULT, load_checkpoint, save_checkpoint
from export.data.sample import sample_windows
from export.model_config import WITH_PRECISIONS
from export.network import PRUNED, WIDTHS, MstGan
from export.onnx import export as onnx_export
from export.repository import stage_path


def installed(folder: Path) -> list[Path]:
    """The FP32 file of every stage."""
    names = dict.fromkeys(WITH_PRECISIONS, "model.fp32.onnx")
    return [
        folder / "models" / stage.name / "1" / names.get(stage.name, "model.onnx") for stage in spec.STAGES
    ]


def test_build_fills_the_repository(built: Path) -> None:
    assert all(path.is_file() for path in installed(built))
    rows = json.loads((built / "build" / "parity.json").read_text())["onnx"]
    assert {(row["precision"], row["stage"], row["tensor"]) for row in rows} == {
        ("fp32", "flow_align", "flow"), ("fp32", "flow_align", "aligned"), ("fp32", "generator", "subpixels"),
        ("fp32", "pixel_shuffle", "hr_frame"), ("fp32", "mst_gan", "hr_frame"),
        ("cpu", "flow_align", "flow"), ("cpu", "flow_align", "aligned"), ("cpu", "mst_gan", "hr_frame"),
    }  # fmt: skip
    assert all(row["passed"] for row in rows)


@pytest.mark.slow
def test_a_light_network_fills_the_same_repository(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WIDTHS, LIGHT.name, LIGHT)
    torch.manual_seed(0)
    save_checkpoint(shake(MstGan(LIGHT)), tmp_path / "light.safetensors", {})
    export_stage = onnx_export.export_stage

    def shared(module: torch.nn.Module, stage: spec.ModelSpec, path: Path) -> None:
        if stage == spec.GENERATOR:
            export_stage(module, stage, path)
        else:  # has no weights
            shutil.copy(stage_path(built / "build", stage), path)

    monkeypatch.setattr(onnx_export, "export_stage", shared)
    result = run_build(tmp_path / "light.safetensors", tmp_path, "--target", "cpu")
    assert result.exit_code == 0, result.output
    assert all(row["passed"] for row in json.loads((tmp_path / "build" / "parity.json").read_text())["onnx"])
    for precision in (
        "fp32",
        "int8",
    ):  # it knows nothing of the flow, which the ensemble hands it all the same
        graph = onnx.load(tmp_path / f"models/generator/1/model.{precision}.onnx").graph
        assert [value.name for value in graph.input] == [tensor.name for tensor in spec.GENERATOR.inputs]
        assert not any("flow" in node.input for node in graph.node)


def test_failed_parity_keeps_the_old_files(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built / "models", tmp_path / "models")
    before = [path.read_bytes() for path in installed(tmp_path)]
    # The graphs of another network: exporting them again would tell no more and take half a minute.
    paths = {stage.name: stage_path(built / "build", stage) for stage in spec.STAGES}
    monkeypatch.setattr(onnx_export, "export_onnx", lambda network, folder: folder.mkdir() or paths)
    other = tmp_path / "other.safetensors"
    save_checkpoint(MstGan(TINY), other, {})
    result = run_build(other, tmp_path)
    assert result.exit_code == 1
    assert "parity with PyTorch does not hold: " in result.output
    assert "generator.subpixels" in result.output
    assert [path.read_bytes() for path in installed(tmp_path)] == before


def test_exported_graphs_keep_the_contract(built: Path) -> None:
    for stage, path in zip(spec.STAGES, installed(built), strict=True):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [spec.OPSET]
        assert b"network/" not in path.read_bytes()  # no path of the machine that exported
        assert [value.name for value in model.graph.input] == [tensor.name for tensor in stage.inputs]
        assert [value.name for value in model.graph.output] == [tensor.name for tensor in stage.outputs]
        operators = [node.op_type for node in model.graph.node]
        # Single nodes: what TensorRT fuses, and has kernels for.
        assert operators.count("GridSample") == {"flow_align": 8, "generator": 2}.get(stage.name, 0)
        assert operators.count("DepthToSpace") == (2 if stage is spec.GENERATOR else 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("generator.head.bias"), "expected generator.head.bias with shape (48,)"),
        (lambda state: state.update(extra=torch.zeros(1)), "expected extra with shape none: no such key"),
        (
            lambda state: state.update({"generator.head.bias": torch.zeros(7)}),
            "expected generator.head.bias with shape (48,), found (7,)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(checkpoint: Path, tmp_path: Path, damage, message: str) -> None:
    state = load_file(checkpoint)
    damage(state)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path, {"widths": TINY.name})
    result = run_build(path, tmp_path)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "found no file"), (b"not safetensors", "to be a safetensors file")],
)
def test_checkpoint_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    result = run_build(path, tmp_path)
    assert result.exit_code == 1
    assert message in result.output


def test_checkpoint_of_unknown_widths(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(load_file(checkpoint), path, {"widths": "colossal"})
    result = run_build(path, tmp_path)
    assert result.exit_code == 1
    assert "one of baseline, pruned" in result.output


def test_checkpoint_whose_weights_are_not_finite(checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(checkpoint)
    state["generator.head.bias"][7] = torch.nan
    path = tmp_path / "diverged.safetensors"
    save_file(state, path, {"widths": TINY.name})
    result = run_build(path, tmp_path)
    assert result.exit_code == 1
    assert "expected finite weights, found others in generator.head.bias" in result.output
    assert result.output.count("\n") == 1


def test_names_of_release_0_1_are_read(checkpoint: Path, tmp_path: Path) -> None:
    old = {"stem": "full", "fuse": "join", "body": "detail", "head": "tail"}
    state = {}
    for name, value in load_file(checkpoint).items():
        first, part, *rest = name.split(".")
        state[".".join((first, old.get(part, part) if first == "generator" else part, *rest))] = value
    assert {"generator.full.weight", "generator.encoder.stem.weight"} <= state.keys()
    path = tmp_path / "old.safetensors"
    save_file(state, path, {"widths": TINY.name})
    found, wanted = (load_checkpoint(file).state_dict() for file in (path, checkpoint))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_committed_checkpoint_fits_the_pruned_widths() -> None:
    assert load_checkpoint(DEFAULT).widths == PRUNED


def test_sample_is_real_moving_video() -> None:
    windows = sample_windows(3, (68, 160))
    assert windows.shape == (3, 3, 68, 160, 3)
    assert windows.std() > 20
    assert np.array_equal(windows[0, 1:], windows[1, :2])  # windows slide by one frame
    assert not np.array_equal(windows[0, 0], windows[0, 1])


def test_help_needs_neither_torch_nor_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx", "onnxruntime", "polygraphy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert CliRunner().invoke(main, ["build", "--help"]).exit_code == 0
