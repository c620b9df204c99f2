"""The peers are the published networks: by parameters, by work, by names of weights, and by one operator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_network import TINY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.network import MstGan, count
from perf import gpu, network
from perf.network import Layer, Network, in_process
from perf.peers import NETWORKS
from perf.peers.__main__ import main
from perf.peers.basicvsr import BasicVsr, SpyNet
from perf.peers.edvr import Edvr
from perf.peers.layers import backward_warp, deform_conv
from perf.peers.rsdn import Cell, Rsdn, structure_of
from perf.results import PerfError

pytestmark = pytest.mark.slow

SIZE = (180, 320)
OURS = Network(partial(MstGan, TINY), 3, takes_bytes=True)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [("BasicVSR", 6.29, 0.005), ("RSDN", 6.18, 0.005), ("EDVR-M", 3.30, 0.005), ("EDVR-L", 20.6, 0.05)],
)
def test_parameters_as_published(name: str, millions: float, tolerance: float) -> None:
    assert NETWORKS[name].parameters() / 1e6 == pytest.approx(millions, abs=tolerance)


def test_work_of_basicvsr_as_published() -> None:
    class Pair(nn.Module):
        """Two flows for each pair of neighbors."""

        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return SpyNet()(frames[:, 0].repeat(4, 1, 1, 1), frames[:, 1].repeat(4, 1, 1, 1))

    flow = Network(Pair, 2, answers=3).flops(SIZE)  # a clip of three frames has two pairs
    assert (NETWORKS["BasicVSR"].flops(SIZE) - flow) / 2e9 == pytest.approx(
        337.8, abs=0.1
    )  # GMAC, without flow


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (BasicVsr, {
            "spynet.mean": (1, 3, 1, 1), "spynet.basic_module.5.basic_module.8.weight": (2, 16, 7, 7),
            "backward_trunk.main.0.weight": (64, 67, 3, 3), "forward_trunk.main.2.29.conv2.bias": (64,),
            "fusion.weight": (64, 128, 1, 1), "upconv2.weight": (256, 64, 3, 3),
        }),
        (partial(Edvr, 128, 40), {
            "feature_extraction.4.conv1.weight": (128, 128, 3, 3), "conv_l3_2.weight": (128, 128, 3, 3),
            "pcd_align.offset_conv2.l1.weight": (128, 256, 3, 3), "pcd_align.offset_conv3.l2.bias": (128,),
            "pcd_align.dcn_pack.l3.conv_offset.weight": (216, 128, 3, 3),
            "pcd_align.cas_dcnpack.bias": (128,), "fusion.feat_fusion.weight": (128, 640, 1, 1),
            "reconstruction.39.conv2.weight": (128, 128, 3, 3), "upconv2.weight": (256, 128, 3, 3),
        }),
        (Rsdn, {
            "neuro.forget.weight": (9, 3, 3, 3), "neuro.conv_d.weight": (128, 182, 3, 3),
            "neuro.SD9.conv_s2.bias": (128,), "neuro.conv_os.weight": (48, 128, 3, 3),
            "conv.weight": (48, 96, 3, 3),
        }),
    ],
)  # fmt: skip
def test_weights_are_named_as_published(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()

    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_answers_four_times_the_size(name: str) -> None:
    one = NETWORKS[name]
    inputs = one.inputs(np.zeros((5, 16, 20, 3), np.uint8))
    with FakeTensorMode() as mode:
        answer = one.build()(mode.from_tensor(inputs))

    assert tuple(answer.shape) == ((1, 64, 80, 3) if one.takes_bytes else (1, one.answers, 3, 64, 80))


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
    rng, (n, c, o, h, w, groups) = np.random.default_rng(0), (2, 4, 3, 4, 5, 2)
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


def test_layers_are_counted_as_pytorch_counts_them() -> None:
    assert OURS.flops((32, 48)) == pytest.approx(count(TINY, (32, 48))[1])
    assert OURS.parameters() == count(TINY, (32, 48))[0]
    conv = Network(partial(FirstFrame, nn.Conv2d(3, 8, 3, padding=1)), 1)
    (layer,) = conv.layers((10, 20))
    assert layer.flops == 2 * 200 * 8 * 3 * 9
    assert layer.elements == 3 * 200 + 8 * 3 * 9 + 8 + 8 * 200  # read and written once


class FirstFrame(nn.Module):
    """A layer as a network of one frame."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.make = type(layer), (3, 8, 3), {"padding": 1}

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        kind, arguments, options = self.make
        return kind(*arguments, **options)(frames[:, 0])


def test_the_roofline_takes_the_nearer_ceiling_of_every_layer() -> None:
    ceilings = {"FP32": 10.0, "FP16": 100.0, "copy": 8.0}
    arithmetic, memory = Layer(flops=100.0, elements=2.0), Layer(flops=1.0, elements=4.0)

    assert gpu.least_seconds([arithmetic], "FP32", ceilings) == 10.0  # 100 FLOP at 10 FLOP/s
    assert gpu.least_seconds([memory], "FP32", ceilings) == 2.0  # 16 bytes at 8 bytes/s
    assert gpu.least_seconds([arithmetic, memory], "FP16", ceilings) == 2.0  # 1 s each


def test_int8_operands_have_the_layout_of_the_fast_kernels() -> None:
    """Row-major times column-major, sides in multiples of 16 (cublasLtMatmul: TN format alone)."""
    left, right = gpu.int8_operands(64, "cpu")

    assert left.dtype == right.dtype == torch.int8
    assert left.stride() == (64, 1)
    assert right.stride() == (1, 64)
    assert torch.equal(torch._int_mm(left, right), left.int() @ right.int())
    with pytest.raises(AssertionError):
        gpu.int8_operands(72, "cpu")
    product = gpu._product("INT8", "cpu", 64)
    assert product().dtype == torch.int32


def test_ceilings_of_this_processor() -> None:
    assert {*gpu.measure_ceilings("cpu", side=64, copy_bytes=2**16, repeats=2)} == {"FP32", "copy"}


def test_without_plans_the_row_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match=r"no plans of all stages, .* run `make plans`"):
        gpu.measure_plans("int8", (16, 16), 1, tmp_path)


def test_a_slow_network_is_measured_on_a_smaller_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def seconds(one: Any, module: Any, runtime: str, size: Any, times: int, device: str) -> Any:
        sizes.append(size)
        return repeat(size[0] * size[1] / (48 * 80), times)  # a second for the probe's 48x80

    monkeypatch.setattr(network, "_seconds", seconds)
    for switch in ("set_num_threads", "set_flush_denormal", "manual_seed"):  # this process is the tests'
        monkeypatch.setattr(torch, switch, lambda _: None)

    row = network.time_network(OURS, network.EAGER, SIZE, limit_s=8, rounds=3, threads=1, device="cpu")

    assert sizes == [network.PROBE, (88, 160)]
    assert row["size"] == [88, 160]
    assert len(row["rounds"]) == 2  # three runs reach the limit, the first does not count


def test_a_process_of_its_own_returns_or_says_what_went_wrong() -> None:
    assert in_process(abs, -3) == 3
    with pytest.raises(PerfError, match="ValueError: invalid literal"):
        in_process(int, "x")
    with pytest.raises(PerfError, match="status 7"):
        in_process(os._exit, 7)
    with pytest.raises(PerfError, match="not done in 1 s"):
        in_process(time.sleep, 60, timeout_s=1)


def test_without_a_gpu_and_with_a_wrong_name_one_line_says_so() -> None:
    for arguments, message in (
        (["--device", "cuda"], "Error: expected a GPU"),
        (["x"], "Error: expected networks"),
    ):
        if arguments[0] == "--device" and torch.cuda.is_available():
            continue
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert result.output.startswith(message)
        assert result.output.count("\n") == 1
