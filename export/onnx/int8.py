"""INT8 for ONNX Runtime's CPU provider: ranges of activations, and Q/DQ around the operators it fuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.calibrate import TensorData, TensorsData

from export import spec
from export.onnx.cpu import head_first, scalars

# Of minmax, 99.99, 99.999 and entropy, what loses least on the three sample clips: 0.004 dB on average,
# where minmax loses 0.006, and entropy 0.009 with one clip at 0.03. One frame of each: a weak preference.
PERCENTILE = 99.999

# Weights of the `cpu` flavor reach +-64, not +-127: without VNNI, ONNX Runtime adds pairs of products in 16
# bits, where 255 x 64 + 255 x 64 still fits and wider ones saturate. Measured 2026-11-24 with AVX2, pruned
# network, 8 frames of each of the three sample clips: +-127 loses 0.09, 0.35 and 0.48 dB (in exact arithmetic
# at most 0.01), +-64 at most 0.02 in either, as fast. Unsigned weights are exact, but take 1.6 times as
# long. Not left to the CPU that exports: a repository may move to another one.
CPU_WEIGHT_LEVEL = 64
TENSORRT_WEIGHT_LEVEL = 127

# Where activations stay 8-bit between convolutions. What only moves values is listed too, so that no value is
# turned to float and back for it.
OPERATORS = (
    "Conv", "Add", "Relu", "Concat", "MaxPool", "Resize",
    "Slice", "Split", "Reshape", "Flatten", "Gather", "Transpose",
)  # fmt: skip

# Operators whose second input says where to sample: it needs more than 256 levels.
SAMPLERS = ("GridSample", "Gather", "GatherND")

# What stands between an image's bytes and the network: moving and scaling; and that around zero.
MOVES = ("Transpose", "Cast", "Div", "Reshape", "Gather", "Slice", "Concat")
SHIFTS = ("Sub", "DequantizeLinear")

Feeds = dict[str, NDArray[np.uint8] | NDArray[np.float32]]


def calibrate(model: onnx.ModelProto, feeds: Iterable[Feeds]) -> TensorsData:
    """Range of every activation, over inputs of the model.

    Images keep their whole range whatever the sample showed: they came as bytes, and become the same bytes
    again without any error.
    """
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        calibrator = create_calibrator(
            source,
            OPERATORS,
            str(Path(folder) / "augmented.onnx"),
            CalibrationMethod.Percentile,
            extra_options={"symmetric": False, "percentile": PERCENTILE},
        )
        with redirect_stdout(StringIO()):  # it prints
            for feed in feeds:  # one at a time: the calibrator holds every activation of what it is handed
                calibrator.collect_data(_OneFeed(feed))
            ranges = calibrator.compute_data()
    constants = scalars(model.graph)
    neutrals = {spec.LR_WINDOW.name: 0.0, spec.ALIGNED.name: 0.0}  # of images: the byte that stands for zero
    for node in image_nodes(model.graph):
        neutral = spec.NEUTRAL if node.op_type == "Sub" else neutrals[node.input[0]]
        if node.op_type == "DequantizeLinear":
            neutral = constants[node.input[2]]
        neutrals |= dict.fromkeys(node.output, neutral)
        low = np.float32(0 - neutral / 255)
        for name in ranges.data.keys() & set(node.output):
            ranges[name] = TensorData(lowest=low, highest=low + np.float32(1))
    return ranges


class _OneFeed(CalibrationDataReader):
    def __init__(self, feed: Feeds) -> None:
        self.feeds = iter([feed])

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)


def quantize_for_cpu(model: onnx.ModelProto, ranges: TensorsData) -> onnx.ModelProto:
    """Q/DQ for ONNX Runtime's CPU provider: unsigned activations, signed weights per channel within +-64.

    Args:
        model: the generator, from ``cpu_graph``.
        ranges: from ``calibrate``.
    """
    model, ranges = copy.deepcopy(model), copy.deepcopy(ranges)
    _share_ranges(model.graph, ranges)
    quantizer = QDQQuantizer(
        model, True, True, QuantType.QInt8, QuantType.QUInt8, ranges,
        [], sorted(float_nodes(model.graph)), list(OPERATORS), {},
    )  # fmt: skip  # the second True is reduce_range: CPU_WEIGHT_LEVEL
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    head_first(quantized.graph)
    return quantized


def _share_ranges(graph: onnx.GraphProto, ranges: TensorsData) -> None:
    """One range for all that a Concat joins: then the provider copies bytes, and looks none of them up."""
    for node in graph.node:
        names = [*node.input, *node.output]
        if node.op_type != "Concat" or not ranges.data.keys() >= set(names):
            continue
        lows, highs = zip(*(ranges[name].range_value for name in names), strict=True)
        for name in names:
            ranges[name] = TensorData(lowest=min(lows), highest=max(highs))


def float_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of nodes never to quantize: the skip connection, and the arithmetic of warps.

    What hands pixels to several warps is among them: in 8 bits, each would turn them to float on its own.
    """
    skip = next(node for node in graph.node if node.op_type == "Pad")  # the bicubic's border
    excluded = {skip.name} | {node.name for node in _descendants(graph, skip.output)}
    warped = {node.input[0] for node in graph.node if node.op_type == "GatherND"}
    excluded |= {node.name for node in graph.node if warped.intersection(node.output)}
    return excluded | {node.name for node in position_nodes(graph)}


def position_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes that compute where to sample, not looking past shapes."""
    wanted = {node.input[1] for node in graph.node if node.op_type in SAMPLERS}
    for node in reversed(graph.node):  # in topological order, as ONNX demands
        if wanted.intersection(node.output) and node.op_type != "Shape":
            wanted.update(node.input)
            yield node


def _descendants(graph: onnx.GraphProto, tensors: Iterable[str]) -> Iterator[onnx.NodeProto]:
    reached = set(tensors)
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            yield node


def image_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes between the images given to the model and the first convolutions: what they make is pixels."""
    images = {spec.LR_WINDOW.name, spec.ALIGNED.name}
    for node in graph.node:
        if node.op_type in (*MOVES, *SHIFTS) and node.input[0] in images:
            images.update(node.output)
            yield node
