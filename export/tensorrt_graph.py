"""An ONNX stage in, the same function as TensorRT's parser takes it out; and its INT8 flavour.

TensorRT takes UINT8 on the boundary alone, so the casts move outwards. Its INT8 is symmetric and signed, with
the biases in float: a quantised bias is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import onnx
from onnx import TensorProto
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from export.quantize import float_nodes, layer_name

OPERATORS = ("Conv", "Add")  # Q/DQ at their inputs, so that convolution, sum and ReLU become one 8-bit layer


def tensorrt_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast frames to float before anything else, and to bytes after everything else."""
    model = copy.deepcopy(model)
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    bytes_in = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
    for first in graph.node:
        reading = [node for node in graph.node if first.output[0] in node.input]
        if len(reading) != 1 or readers[first.output[0]] != 1:
            continue
        (second,) = reading
        moves_in = (first.op_type, second.op_type) == ("Transpose", "Cast") and first.input[0] in bytes_in
        moves_out = (first.op_type, second.op_type) == ("Cast", "Transpose") and _to_bytes(first)
        if moves_in or moves_out:
            first.op_type, second.op_type = second.op_type, first.op_type
            attributes = list(first.attribute)
            del first.attribute[:]
            first.attribute.extend(second.attribute)
            del second.attribute[:]
            second.attribute.extend(attributes)
    del graph.value_info[:]  # types have moved with the casts
    return onnx.shape_inference.infer_shapes(model)


def quantise_for_tensorrt(
    model: onnx.ModelProto, ranges: TensorsData, left_float: Sequence[str] = ()
) -> onnx.ModelProto:
    """Explicit Q/DQ: signed, zero point 0, weights per channel, on both inputs of residual sums.

    Args:
        model: the FP32 generator, from ``tensorrt_graph``.
        ranges: from ``calibrate``.
        left_float: convolutions to leave alone, by the network's names.
    """
    model = copy.deepcopy(model)
    excluded = float_nodes(model.graph)
    excluded |= {n.name for n in model.graph.node if n.op_type == "Conv" and layer_name(n) in left_float}
    quantizer = QDQQuantizer(
        model, True, False, QuantType.QInt8, QuantType.QInt8, copy.deepcopy(ranges),
        [], sorted(excluded), list(OPERATORS),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "OpTypesToExcludeOutputQuantization": list(OPERATORS),
        },
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


def _to_bytes(cast: onnx.NodeProto) -> bool:
    return any(attribute.name == "to" and attribute.i == TensorProto.UINT8 for attribute in cast.attribute)
