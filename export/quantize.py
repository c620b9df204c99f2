"""FP32 generator and calibration windows in, an INT8 Q/DQ generator and its sensitivity table out."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from torch import Tensor, nn

from export import spec
from export.cpu_graph import scalars, tail_first
from export.network import Generator
from export.network.frames import frames_from_window
from export.network.layers import convolutions

log = logging.getLogger(__name__)

TABLE = "sensitivity.json"

# Of minmax, 99.99, 99.999 and entropy, what loses least on the three sample clips: 0.004 dB on average,
# where minmax loses 0.006, and entropy 0.009 with one clip at 0.03. One frame of each: a weak preference.
PERCENTILE = 99.999

# Weights of the `cpu` flavour reach +-64, not +-127: without VNNI, ONNX Runtime adds pairs of products in 16
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

Levels = tuple[float, int, int, int]
"""Scale, zero point, lowest and highest integer."""

Feeds = dict[str, NDArray[np.uint8] | NDArray[np.float32]]


@dataclass(frozen=True)
class Layer:
    """One convolution quantised alone: weights, input and output."""

    name: str
    noise: float
    """Mean squared error that it adds to the sub-pixels before they are rounded, white = 1."""
    psnr_db: float
    """The same, as PSNR against the float network's answer."""
    mac_share: float
    """Of the generator's multiplications in such convolutions."""


def chosen_float(layers: Sequence[Layer], parent_error: float, budget_db: float) -> list[str]:
    """Layers to leave in float: the noisiest, until what the rest loses fits the budget.

    Rounding errors of different layers hardly correlate, so their squares add up; on top of the parent's own
    error against the truth they cost 10 log10(1 + noise / error) dB.

    Args:
        layers: all convolutions that could be quantised.
        parent_error: mean squared error of the float network against the truth, white = 1.
        budget_db: PSNR that quantisation may cost.
    """
    allowed = parent_error * (10 ** (budget_db / 10) - 1)
    left_out = []
    remaining = math.fsum(layer.noise for layer in layers)
    for layer in sorted(layers, key=lambda layer: layer.noise, reverse=True):
        if remaining <= allowed:
            break
        left_out.append(layer.name)
        remaining -= layer.noise
    return left_out


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
    for node in image_nodes(model.graph):
        neutral = spec.NEUTRAL if node.op_type == "Sub" else 0.0
        if node.op_type == "DequantizeLinear":
            neutral = constants[node.input[2]]
        low = np.float32(0 - neutral / 255)
        for name in ranges.data.keys() & set(node.output):
            ranges[name] = TensorData(lowest=low, highest=low + np.float32(1))
    return ranges


class _OneFeed(CalibrationDataReader):
    def __init__(self, feed: Feeds) -> None:
        self.feeds = iter([feed])

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)


def sensitivity(
    generator: Generator,
    model: onnx.ModelProto,
    ranges: TensorsData,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    symmetric: bool = False,
) -> list[Layer]:
    """Quantise one convolution at a time and compare the answers, noisiest first.

    Activations by PyTorch's fake quantisation: the same arithmetic, and no session to build for every layer.

    Args:
        generator: the network that ``model`` was exported from.
        model: its ONNX graph, whose initializers carry the network's names.
        ranges: of the graph's activations.
        weights: by the network's names, rounded, see ``rounding.rounded_weights``.
        inputs: the generator's, see ``Generator.forward``.
        symmetric: whether activations are signed around zero, as for TensorRT.
    """
    activations = _convolution_activations(model)
    lr_window, flow, aligned = inputs
    with torch.inference_mode():
        unrounded = (frames_from_window(lr_window), flow, aligned.float() / 255)
        reference = generator.generate(*unrounded)
        rows, macs = [], []
        for name, conv in convolutions(generator).items():
            source, target = (_levels(ranges[tensor], symmetric) for tensor in activations[name])
            with _fake_quantised(conv, source, target, weights[name]) as counted:
                noise = float((generator.generate(*unrounded) - reference).square().mean())
            rows.append((name, noise))
            macs.append(counted[0])
    layers = [
        Layer(name, noise, 10 * math.log10(1 / max(noise, 1e-20)), count / sum(macs))
        for (name, noise), count in zip(rows, macs, strict=True)
    ]
    return sorted(layers, key=lambda layer: layer.noise, reverse=True)


def write_table(path: Path, layers: Sequence[Layer], left_float: Sequence[str], budget_db: float) -> None:
    """Write the sensitivity table, and what it decided."""
    rule = (
        "Each layer quantised alone. The noisiest stay in float until the noise of the others, added up, "
        f"costs at most {budget_db:g} dB against the truth. Never quantised: flow, sampling positions and "
        "weights of warps, the bicubic skip and its addition."
    )
    table = {
        "rule": rule,
        "float": list(left_float),
        "layers": [asdict(layer) for layer in layers],
    }
    path.write_text(json.dumps(table, indent=2) + "\n")


def quantise_for_cpu(
    model: onnx.ModelProto, ranges: TensorsData, left_float: Sequence[str] = ()
) -> onnx.ModelProto:
    """Q/DQ for ONNX Runtime's CPU provider: unsigned activations, signed weights per channel within +-64.

    Args:
        model: the generator, from ``cpu_graph``.
        ranges: from ``calibrate``.
        left_float: convolutions to leave alone, by the network's names.
    """
    model, ranges = copy.deepcopy(model), copy.deepcopy(ranges)
    _join_ranges(model.graph, ranges)
    excluded = float_nodes(model.graph) | _keep_float(model.graph, left_float)
    quantizer = QDQQuantizer(
        model, True, True, QuantType.QInt8, QuantType.QUInt8, ranges,
        [], sorted(excluded), list(OPERATORS), {},
    )  # fmt: skip  # the second True is reduce_range: CPU_WEIGHT_LEVEL
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    tail_first(quantised.graph)
    return quantised


def _join_ranges(graph: onnx.GraphProto, ranges: TensorsData) -> None:
    """One range for all that a Concat joins: then the provider copies bytes, and looks none of them up."""
    for node in graph.node:
        names = [*node.input, *node.output]
        if node.op_type != "Concat" or not ranges.data.keys() >= set(names):
            continue
        lows, highs = zip(*(ranges[name].range_value for name in names), strict=True)
        for name in names:
            ranges[name] = TensorData(lowest=min(lows), highest=max(highs))


def _keep_float(graph: onnx.GraphProto, left_float: Sequence[str]) -> set[str]:
    """Make sure that the chosen layers are computed in float; gives the names of nodes to leave alone.

    Leaving them out is not enough: ONNX Runtime from 1.21 on quantises the weights of any convolution that
    finds itself between Q/DQ (microsoft/onnxruntime#22969), with a ReLU behind it too. It does not look past
    a LeakyRelu, which is a ReLU at slope 0 and nothing at slope 1, and fuses it into the float convolution.
    """
    readers = Counter(name for node in graph.node for name in node.input)
    kept = set()
    for conv in [node for node in graph.node if node.op_type == "Conv" and layer_name(node) in left_float]:
        guard = next((n for n in graph.node if n.op_type == "Relu" and n.input[0] == conv.output[0]), None)
        if guard is not None and readers[conv.output[0]] == 1:
            guard.op_type = "LeakyRelu"
            guard.attribute.append(onnx.helper.make_attribute("alpha", 0.0))
        else:
            (answer,) = conv.output
            conv.output[0] = f"{answer}_unguarded"
            guard = onnx.helper.make_node("LeakyRelu", conv.output, [answer], f"{conv.name}_guard", alpha=1.0)
            graph.node.insert(list(graph.node).index(conv) + 1, guard)
        kept |= {conv.name, guard.name}
    return kept


def float_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of nodes never to quantise: the skip connection, and the arithmetic of warps.

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


def layer_name(conv: onnx.NodeProto) -> str:
    """The network's name of a convolution."""
    return conv.input[1].removesuffix(".woven").removesuffix(".weight")


def _convolution_activations(model: onnx.ModelProto) -> Mapping[str, tuple[str, str]]:
    """Layer -> tensors it reads and makes; where a ReLU alone reads what it makes, the ReLU's."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    return {
        layer_name(node): (
            node.input[0],
            clipped.get(node.output[0], node.output[0]) if readers[node.output[0]] == 1 else node.output[0],
        )
        for node in model.graph.node
        if node.op_type == "Conv"
    }


def _levels(data: TensorData, symmetric: bool) -> Levels:
    """What a tensor is rounded to; 0 is always a level."""
    low, high = (float(value) for value in data.range_value)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(-low, high) / 127 or 1.0, 0, -128, 127
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale), 0, 255


@contextmanager
def _fake_quantised(conv: nn.Conv2d, source: Levels, target: Levels, weight: Tensor) -> Iterator[list[int]]:
    """Round the layer's input and output too; gives its multiplications, once it has run."""
    float_weight, macs = conv.weight.data, [0]

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(inputs[0], *source)

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        macs[0] = output.numel() * float_weight[0].numel()
        return torch.fake_quantize_per_tensor_affine(output, *target)

    conv.weight.data = weight
    hooks = (conv.register_forward_pre_hook(before), conv.register_forward_hook(after))
    try:
        yield macs
    finally:
        conv.weight.data = float_weight
        for hook in hooks:
            hook.remove()
