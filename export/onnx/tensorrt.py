"""Stages as TensorRT's parser takes them, and the generator's INT8 form for it.

TensorRT takes UINT8 on the boundary alone, so the casts move outwards, and what only moves bytes moves
FP16, which holds them exactly. INT8 is symmetric and signed, with the biases in float: a quantized bias is
refused.
"""

from __future__ import annotations

import copy

import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from export.onnx.int8 import float_nodes

OPERATORS = ("Conv", "Add")  # Q/DQ at their inputs, so that convolution, sum and ReLU become one 8-bit layer


def tensorrt_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast frames to float first and to bytes last."""
    model = copy.deepcopy(model)
    _cast_at_the_edge(model.graph)
    del model.graph.value_info[:]  # types have moved with the casts
    return onnx.shape_inference.infer_shapes(model)


def quantize_for_tensorrt(model: onnx.ModelProto, ranges: TensorsData) -> onnx.ModelProto:
    """Explicit Q/DQ: signed, zero point 0, weights per channel, on both inputs of residual sums.

    Args:
        model: the FP32 generator, from ``tensorrt_graph``.
        ranges: from ``calibrate``.
    """
    model = copy.deepcopy(model)
    quantizer = QDQQuantizer(
        model, True, False, QuantType.QInt8, QuantType.QInt8, copy.deepcopy(ranges),
        [], sorted(float_nodes(model.graph)), list(OPERATORS),
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
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _cast_at_the_edge(graph: onnx.GraphProto) -> None:
    """Cast bytes that come in or go out elsewhere than at a Cast."""
    nodes = list(graph.node)
    for value in graph.input:
        readers = [node for node in nodes if value.name in node.input and node.op_type != "Cast"]
        if value.type.tensor_type.elem_type != TensorProto.UINT8 or not readers:
            continue
        half = f"{value.name}_float16"
        for node in readers:
            node.input[:] = [half if name == value.name else name for name in node.input]
        nodes.insert(0, helper.make_node("Cast", [value.name], [half], half, to=TensorProto.FLOAT16))
    for value in graph.output:
        maker = next(node for node in nodes if value.name in node.output)
        if value.type.tensor_type.elem_type != TensorProto.UINT8 or maker.op_type == "Cast":
            continue
        half = f"{value.name}_float16"
        for node in nodes:  # what it joins may have been cast on its own
            if node.op_type == "Cast" and node.output[0] in maker.input and _casts_to_bytes(node):
                node.attribute[0].i = TensorProto.FLOAT16
        maker.output[:] = [half if name == value.name else name for name in maker.output]
        nodes.append(helper.make_node("Cast", [half], [value.name], value.name, to=TensorProto.UINT8))
    del graph.node[:]
    graph.node.extend(nodes)


def _casts_to_bytes(cast: onnx.NodeProto) -> bool:
    return bool(helper.get_node_attr_value(cast, "to") == TensorProto.UINT8)
