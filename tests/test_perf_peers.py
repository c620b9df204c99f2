"""The peers are the published networks: by parameters, by work, by names of weights, and by one operator."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perf import results
from perf.errors import PerfError
from perf.peers import layers, timing
from perf.peers.__main__ import main, runtimes
from perf.peers.basicvsr import BasicVsr, SpyNet
from perf.peers.deform_conv import deform_conv
from perf.peers.edvr import edvr_l
from perf.peers.improved_edvr import ImprovedEdvr
from perf.peers.layers import backward_warp
from perf.peers.papers import papers_sections
from perf.peers.rows import ROWS, count
from perf.peers.rsdn import Cell, Rsdn, structure_of
from perf.peers.table import peers_section

PERF = Path(__file__).parent.parent / "perf"
SIZE = (180, 320)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("BasicVSR", 6.29, 0.005),
        ("RSDN", 6.18, 0.005),
        ("EDVR-M", 3.30, 0.005),
        ("EDVR-L", 20.6, 0.05),
        ("Improved EDVR", 3.5, 0.05),
        ("EDSR baseline", 1.52, 0.005),
        ("bicubic", 0, 0),
    ],
)
def test_parameters_as_published(name: str, millions: float, tolerance: float) -> None:
    assert count(ROWS[name], (32, 32)).parameters / 1e6 == pytest.approx(millions, abs=tolerance)


def test_work_of_basicvsr_without_flow_as_published() -> None:
    cost = count(ROWS["BasicVSR"], SIZE)

    assert (cost.flops - cost.flow_flops) / 2e9 == pytest.approx(337.8, abs=0.1)  # GMAC at 320x180
    # Two flows for each pair of neighbours, and the clip has one pair less than frames.
    assert cost.flow_flops / 2e9 == pytest.approx(39.3 * 2 / 3, abs=0.1)


def test_work_grows_with_the_area() -> None:
    for name in ("MST-GAN, pruned", "EDVR-M", "RSDN"):
        assert count(ROWS[name], (128, 192)).flops == pytest.approx(
            4 * count(ROWS[name], (64, 96)).flops, rel=0.02
        )


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (
            BasicVsr,
            {
                "spynet.mean": (1, 3, 1, 1),
                "spynet.basic_module.5.basic_module.8.weight": (2, 16, 7, 7),
                "backward_trunk.main.0.weight": (64, 67, 3, 3),
                "forward_trunk.main.2.29.conv2.bias": (64,),
                "fusion.weight": (64, 128, 1, 1),
                "upconv2.weight": (256, 64, 3, 3),
                "conv_last.weight": (3, 64, 3, 3),
            },
        ),
        (
            edvr_l,
            {
                "feature_extraction.4.conv1.weight": (128, 128, 3, 3),
                "conv_l3_2.weight": (128, 128, 3, 3),
                "pcd_align.offset_conv2.l3.weight": (128, 128, 3, 3),
                "pcd_align.offset_conv2.l1.weight": (128, 256, 3, 3),
                "pcd_align.offset_conv3.l2.bias": (128,),
                "pcd_align.dcn_pack.l1.weight": (128, 128, 3, 3),
                "pcd_align.dcn_pack.l3.conv_offset.weight": (216, 128, 3, 3),
                "pcd_align.cas_dcnpack.bias": (128,),
                "fusion.feat_fusion.weight": (128, 640, 1, 1),
                "fusion.spatial_attn_add2.weight": (128, 128, 1, 1),
                "reconstruction.39.conv2.weight": (128, 128, 3, 3),
                "upconv2.weight": (256, 128, 3, 3),
            },
        ),
        (
            Rsdn,
            {
                "neuro.forget.weight": (9, 3, 3, 3),
                "neuro.conv_d.weight": (128, 182, 3, 3),
                "neuro.SD9.conv_s2.bias": (128,),
                "neuro.conv_os.weight": (48, 128, 3, 3),
                "conv.weight": (48, 96, 3, 3),
            },
        ),
    ],
)
def test_weights_are_named_as_published(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()

    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("wrap", [lambda state: {"params": state}, lambda state: state])
def test_checkpoints_load_in_their_wrappings(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    source, target = SpyNet(), SpyNet()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "published.pth")

    layers.load(target, tmp_path / "published.pth")

    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name])


def direct_deform_conv(x, offset, mask, weight, bias, groups):  # type: ignore[no-untyped-def]
    """Equation 1 of the paper, sample by sample."""
    n, c, h, w = x.shape
    out = np.zeros((n, len(weight), h, w))

    def at(image: Any, y: float, x_at: float) -> float:
        total, y0, x0 = 0.0, int(np.floor(y)), int(np.floor(x_at))
        for yi, xi in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            if 0 <= yi < h and 0 <= xi < w:
                total += image[yi, xi] * (1 - abs(y - yi)) * (1 - abs(x_at - xi))
        return total

    for b, o, y, x_at in np.ndindex(*out.shape):
        total = bias[o]
        for channel, tap in np.ndindex(c, 9):
            part = channel // (c // groups) * 9 + tap
            dy, dx = offset[b, 2 * part, y, x_at], offset[b, 2 * part + 1, y, x_at]
            value = at(x[b, channel], y + tap // 3 - 1 + dy, x_at + tap % 3 - 1 + dx)
            total += weight[o, channel, tap // 3, tap % 3] * value * mask[b, part, y, x_at]
        out[b, o, y, x_at] = total
    return out


def test_deformable_convolution_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    n, c, o, h, w, groups = 2, 4, 3, 4, 5, 2
    arrays = (
        rng.normal(size=(n, c, h, w)), rng.normal(0, 2, size=(n, 18 * groups, h, w)),
        rng.random((n, 9 * groups, h, w)), rng.normal(size=(o, c, 3, 3)), rng.normal(size=o),
    )  # fmt: skip

    found = deform_conv(*(torch.from_numpy(array) for array in arrays), groups)

    np.testing.assert_allclose(found.numpy(), direct_deform_conv(*arrays, groups), atol=1e-10)


def test_warp_by_whole_pixels_shifts_each_axis() -> None:
    image = torch.arange(20.0).view(1, 1, 4, 5)
    for axis, expected in ((0, image[..., 1:]), (1, image[..., 1:, :])):
        flow = torch.zeros(1, 2, 4, 5)
        flow[:, axis] = 1
        warped = backward_warp(image, flow, "zeros")[..., : expected.shape[-2], : expected.shape[-1]]
        torch.testing.assert_close(warped, expected)


def test_hidden_state_is_faded_by_a_filter_of_each_pixel() -> None:
    cell, hidden, frame = Cell(), torch.randn(1, 128, 4, 5), torch.rand(1, 3, 4, 5)
    with torch.no_grad():
        filters = nn.functional.leaky_relu(cell.forget(frame), 0.1).view(1, 1, 9, 20)
        patches = nn.functional.unfold(hidden, 3, padding=1).view(1, 128, 9, 20)
        expected = hidden * torch.sigmoid((filters * patches).sum(dim=2).view_as(hidden))

        torch.testing.assert_close(cell.adapt(hidden, frame), expected)


def test_structure_of_something_smooth_is_itself() -> None:
    flat = torch.full((1, 2, 3, 8, 12), 0.25)
    torch.testing.assert_close(structure_of(flat), flat)


@pytest.mark.parametrize("name", list(ROWS))
def test_every_network_answers_four_times_the_size(name: str) -> None:
    row = ROWS[name]
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), dtype=np.uint8)
    inputs = row.inputs(frames)
    with FakeTensorMode() as mode:
        answer = row.build()(mode.from_tensor(inputs))

    expected = (1, 64, 80, 3) if row.takes_bytes else (1, row.answers, 3, 64, 80)
    assert tuple(answer.shape) == expected


def test_onnx_runtime_answers_as_pytorch_does() -> None:
    torch.manual_seed(0)
    network = ImprovedEdvr().eval()
    inputs = torch.rand(1, 5, 3, 16, 20)

    session: onnxruntime.InferenceSession = timing._session(network, inputs, 1)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})

    with torch.no_grad():
        np.testing.assert_allclose(found, network(inputs).numpy(), atol=1e-4)


def test_slow_network_is_measured_on_a_smaller_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def runs(row: Any, network: Any, runtime: str, size: Any, threads: int, times: int, device: str) -> Any:
        sizes.append(size)
        return [size] * times

    # A second for the probe's 48x80: 180x320 would take 15, 88x160 takes 3.7.
    monkeypatch.setattr(timing, "_runs", runs)
    for switch in ("set_num_threads", "set_flush_denormal", "manual_seed"):  # this process is the tests'
        monkeypatch.setattr(torch, switch, lambda _: None)
    monkeypatch.setattr(timing, "_seconds", lambda size: size[0] * size[1] / (48 * 80))

    row = timing.measure("bicubic", timing.EAGER, SIZE, limit_s=8, rounds=3, threads=1)

    assert sizes == [timing.PROBE, (88, 160)]
    assert row["size"] == [88, 160]
    assert len(row["ms_per_frame"]) == 2  # three runs reach the limit, the first does not count


def test_tables_mark_smaller_rows_and_print_the_papers_units(tmp_path: Path) -> None:
    network = {"parameters": 6291311, "flops": 727.5e9, "flops_at_papers_size": 11640e9}
    row = {
        "network": "BasicVSR",
        "runtime": "PyTorch",
        "ms_per_frame": [4000.0, 5000.0],
        "peak_memory_mb": 900.4,
    }
    rows = [{**row, "size": [180, 320]}, {**row, "size": [88, 160], "others_cores": 0.5}]
    result = peers_result({"BasicVSR": network}, rows)

    measured, (papers, _) = peers_section(result), papers_sections({"peers": result})

    assert measured.table and papers.table
    assert measured.plot and "BasicVSR, PyTorch, estimated" in measured.plot
    assert [cells[4] for cells in measured.table.rows] == ["320x180", "160x88 (smaller)"]
    assert measured.table.rows[1][5] == "!4500 (4000-5000)"
    assert "at 1 of 2 rows" in measured.text[-1]
    assert measured.table.rows[0][5:7] == ("4500 (4000-5000)", "0.23 (0.20-0.25)")
    (line,) = papers.table.rows
    assert line[:6] == ("BasicVSR", "6.3 M", "6.29 M", "5400", "5820", "11640")


MACHINE = {
    "cpu": "c", "cores": 2, "vector_units": ["avx2"], "memory_gb": 1, "gpu": None, "system": "s",
    "versions": {}, "load_1m_at_start": 0, "date": "2026-01-02 03:04 UTC", "commit": "e",
}  # fmt: skip


def peers_result(networks: dict[str, Any], rows: list[Any], name: str = "peers") -> dict[str, Any]:
    return {
        "kind": "peers", "name": name, "threads": 2, "size": [180, 320], "papers_size": [720, 1280],
        "machine": MACHINE, "networks": networks, "rows": rows,
    }  # fmt: skip


def papers_lines(**results: Any) -> dict[str, tuple[str, ...]]:
    """Line of the papers -> its cells from our milliseconds on."""
    _, measured = papers_sections(results)
    assert measured.table
    return {row[0]: row[4:] for row in measured.table.rows}


def peer(network: str, ms: float, size: list[int], runtime: str = "PyTorch") -> dict[str, Any]:
    return {
        "network": network, "runtime": runtime, "ms_per_frame": [ms], "size": size, "peak_memory_mb": 500.0
    }  # fmt: skip


def test_papers_lines_stand_beside_ours_and_scaled_ones_say_estimated() -> None:
    counted = {"parameters": 1, "flops": 1.0, "flops_at_papers_size": 1.0}
    peers = peers_result(
        {"MST-GAN, pruned": counted, "EDVR-L": counted},
        [peer("MST-GAN, pruned", 200.0, [180, 320]), peer("EDVR-L", 4000.0, [90, 160])],
    )
    rung = {
        "key": "pruned-int8",
        "name": "pruned, INT8",
        "fps": 10.0,
        "ms_per_frame": 100.0,
        "peak_memory_mb": 9,
    }
    missing = {"key": "pruned-fp16", "name": "pruned, FP16", "fps": None, "why": "no GPU"}
    ladder = {
        "kind": "ladder",
        "name": "ladder",
        "machine": MACHINE,
        "input_size": [180, 320],
        "rows": [rung, missing],
    }

    lines = papers_lines(peers=peers, ladder=ladder)

    place = "2 cores, AVX2, 2026-01-02"
    assert lines["pruned 40 %"] == ("200", "5.00", "500", "PyTorch FP32", place)
    assert lines["pruned, INT8, TensorRT"] == ("100", "10.00", "9", "pruned, INT8", place)
    assert lines["pruned, FP16"] == ("-", "-", "-", "no GPU", "-")
    assert lines["EDVR-L"] == ("16000 *estimated*", "0.06 *estimated*", "-", "PyTorch FP32", place)
    assert lines["BasicVSR"] == ("-",) * 5


def test_a_gpu_is_one_more_column() -> None:
    counted = {"parameters": 1, "flops": 1.0, "flops_at_papers_size": 1.0}
    here = peers_result({"EDVR-L": counted}, [peer("EDVR-L", 9000.0, [180, 320])])
    there = peers_result({"EDVR-L": counted}, [peer("EDVR-L", 40.0, [180, 320], "PyTorch FP32")], "peers_gpu")
    row = {"key": "pytorch-fp16-pruned", "size": [180, 320], "fps_rounds": [99.0, 100.0, 101.0]}
    gpu = {
        "kind": "gpu", "name": "gpu", "machine": {**MACHINE, "gpu": "a GPU"},
        "rows": [{**row, "peak_gpu_memory_mb": 700.0}],
    }  # fmt: skip

    lines = papers_lines(peers=here, peers_gpu=there, gpu=gpu)

    assert lines["pruned, FP16"][-2:] == ("10.00", "700")
    assert lines["EDVR-L"] == (
        "9000",
        "0.11",
        "500",
        "PyTorch FP32",
        "2 cores, AVX2, 2026-01-02",
        "40",
        "500",
    )
    assert lines["RSDN"][-2:] == ("-", "-")

    elsewhere = {**gpu, "rows": [{**row, "size": [720, 1280], "peak_gpu_memory_mb": 700.0}]}
    assert len(papers_lines(peers=here, gpu=elsewhere)["EDVR-L"]) == 5  # nothing to show, and so no column


def test_a_network_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(function: Any, name: str, runtime: str, *rest: Any) -> Any:
        if runtime == timing.EAGER:
            raise PerfError("too little memory")
        return peer(name, 5.0, [16, 24], runtime)

    monkeypatch.setattr("perf.peers.__main__.in_process", fail_once)

    result = CliRunner().invoke(main, ["bicubic", "--size", "16", "24", "--out", str(tmp_path)])

    assert result.exit_code == 1
    assert "Error: 1 rows are missing: bicubic in PyTorch: too little memory" in result.output
    (row,) = results.load(tmp_path / "peers.json")["rows"]
    assert row["runtime"] == timing.ONNX


def test_unknown_network_is_one_line() -> None:
    result = CliRunner().invoke(main, ["nonsense"])

    assert result.exit_code == 1
    assert result.output.startswith("Error: expected networks among MST-GAN, ")
    assert result.output.count("\n") == 1


def test_results_of_a_run(tmp_path: Path) -> None:
    arguments = ["bicubic", "--size", "16", "24", "--rounds", "2", "--out", str(tmp_path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0

    result = results.load(tmp_path / "peers.json")
    assert [(row["network"], row["runtime"], row["size"]) for row in result["rows"]] == [
        ("bicubic", "PyTorch", [16, 24]),
        ("bicubic", "ONNX Runtime", [16, 24]),
    ]
    assert all(len(row["ms_per_frame"]) == 2 and row["peak_memory_mb"] > 10 for row in result["rows"])
    assert all(row["others_cores"] >= 0 for row in result["rows"])


def test_on_a_gpu_only_ours_is_compiled() -> None:
    assert runtimes("MST-GAN, pruned", has_gpu=True) == timing.ON_GPU
    assert runtimes("BasicVSR", has_gpu=True) == timing.ON_GPU[:3]
    assert runtimes("BasicVSR", has_gpu=False) == (timing.EAGER, timing.ONNX)


def test_only_what_builds_or_scores_networks_imports_them() -> None:
    """Everything else measures what is served, whoever made it."""
    importing = {
        path.relative_to(PERF).as_posix()
        for path in PERF.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "export"
    }
    assert importing == {
        "gpu/plans.py", "gpu/roofline.py", "gpu/rows.py", "peers/rows.py", "ladder/eager.py",
        "ladder/quality.py", "ladder/weights.py",
    }  # fmt: skip
