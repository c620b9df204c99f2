"""INT8 for ONNX Runtime's CPU provider: the same function, fused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import av
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_sessions import feeds, run, session

from export import spec
from export.data.sample import calibration_windows
from export.errors import ExportError
from export.onnx.cpu import cpu_graph
from export.onnx.int8 import calibrate
from export.verify.compare import psnr_db

RESIDUAL_ADDS = 4 + 3 + 1 + 1  # of the tiny network: encoder, top-down, context, detail


@pytest.fixture(scope="module")
def fp32(built: Path) -> Path:
    return built / "build/generator.onnx"


@pytest.fixture(scope="module")
def int8(built: Path) -> Path:
    return built / "build/generator.int8.onnx"


@pytest.fixture(scope="module")
def operators(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What ONNX Runtime really runs, in its order."""
    path = tmp_path_factory.mktemp("optimized") / "model.onnx"
    session(int8, path)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(scope="module")
def fused(operators: list[str]) -> Counter[str]:
    return Counter(operators)


def test_every_convolution_but_the_skip_is_fused(fp32: Path, fused: Counter[str]) -> None:
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(fp32).graph.node)
    assert fused["QLinearConv"] == convolutions - 1
    assert fused["Conv"] == spec.CHANNELS  # one for each color of the skip
    assert fused["QLinearAdd"] == RESIDUAL_ADDS
    assert fused["QLinearConcat"] == 3
    # Warped features in twice, and the answer's colors rounded. Frames and what is aligned come as bytes.
    assert fused["QuantizeLinear"] == 2 + spec.CHANNELS
    # Features out to both warps; center frame and tail out to the sum, the latter by colors.
    assert fused["DequantizeLinear"] == 2 + 1 + spec.CHANNELS


def test_no_skip_connection_is_kept_while_the_network_runs(operators: list[str]) -> None:
    last_of_the_network = len(operators) - 1 - operators[::-1].index("QLinearConv")
    assert operators.index("Conv") > last_of_the_network


def test_activations_are_unsigned_and_weights_signed_per_channel(int8: Path) -> None:
    graph = onnx.load(int8).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    checked = 0
    for conv in convolutions:
        activation, weight = (producers.get(name) for name in conv.input[:2])
        if activation is None or weight is None or activation.op_type != "DequantizeLinear":
            continue
        assert values[activation.input[2]].dtype == np.uint8
        weights, scales, zero_points = (values[name] for name in weight.input)
        assert weights.dtype == np.int8
        assert scales.shape == (weights.shape[0],)
        assert not zero_points.any()
        checked += 1
    assert checked == len(convolutions) - spec.CHANNELS  # all but the skip


def test_the_file_is_a_valid_graph_in_topological_order(int8: Path) -> None:
    onnx.checker.check_model(onnx.load(int8), full_check=True)


def test_no_pair_of_products_exceeds_16_bits(int8: Path) -> None:
    """Whichever two weights of a filter are added first, with activations at their highest."""
    graph = onnx.load(int8).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    filters = [array.astype(int) for array in values.values() if array.dtype == np.int8 and array.ndim == 4]
    assert filters
    for array in filters:
        lowest_first = np.sort(array.reshape(len(array), -1), axis=1)
        assert 255 * lowest_first[:, -2:].sum(axis=1).max() <= np.iinfo(np.int16).max
        assert 255 * lowest_first[:, :2].sum(axis=1).min() >= np.iinfo(np.int16).min


@pytest.mark.parametrize("lr_size", [(16, 1152), (1152, 16)])
def test_positions_are_finer_than_256_steps(fp32: Path, int8: Path, lr_size: spec.Size) -> None:
    inputs = feeds(lr_size)
    assert psnr_db(run(int8, inputs), run(fp32, inputs), peak=255) > 45


def test_images_keep_their_range_after_a_dark_sample(fp32: Path) -> None:
    model = cpu_graph(onnx.load(fp32))
    dark = feeds((20, 36))
    dark["lr_window"] //= 8
    dark["aligned"] //= 8
    ranges = calibrate(model, [dark])
    first, second = (
        next(n.input[0] for n in model.graph.node if n.op_type == "Conv" and n.input[1] == f"{name}.weight")
        for name in ("encoder.stem", "stem")
    )
    for name, lowest in ((first, 0), (second, -spec.NEUTRAL / 255)):
        expected = pytest.approx((lowest, lowest + 1))
        assert tuple(float(value) for value in ranges[name].range_value) == expected


def write_video(path: Path, side: int, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = "bgr0"
        for index in range(frames):
            image = np.full((side, side, 3), index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def test_calibration_windows_of_a_folder(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 80, 63)
    windows = calibration_windows(tmp_path)
    # Reduced to the whole multiples of 80 px, and as it is.
    assert [window.shape[2:4] for window in windows] == [(20, 20), (80, 80)] * 2
    assert [int(window[0, 0].max()) for window in windows] == [10, 10, 60, 60]


def test_calibration_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected videos to calibrate on in .*, found none"):
        calibration_windows(tmp_path)


@pytest.mark.parametrize(
    ("side", "frames", "found"),
    [(48, 63, "3 frames of 48x48 from frame 10 on"), (80, 62, "2 frames of 80x80 from frame 60 on")],
)
def test_calibration_video_that_is_too_small(tmp_path: Path, side: int, frames: int, found: str) -> None:
    write_video(tmp_path / "a.mkv", side, frames)
    with pytest.raises(ExportError, match=f"a.mkv to have 63 frames of 64x64 or more .*found {found}"):
        calibration_windows(tmp_path)


def test_calibration_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(ExportError, match=r"expected .*notes.txt to be a video"):
        calibration_windows(tmp_path)
