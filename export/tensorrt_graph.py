"""An ONNX stage in, the same function as TensorRT's parser takes it out; and its INT8 flavour.

TensorRT takes UINT8 on the boundary alone, so the casts move outwards. Sides that are padded to whole
granules are stated as such, without which TensorRT-RTX compiles no range of sizes. INT8 is symmetric and
signed, with the biases in float: a quantised bias is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from export.quantize import float_nodes, layer_name

OPERATORS = ("Conv", "Add")  # Q/DQ at their inputs, so that convolution, sum and ReLU become one 8-bit layer


def tensorrt_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast frames to float first and to bytes last, and state the sides of padded images."""
    model = copy.deepcopy(model)
    graph = model.graph
    _state_granules(graph)
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


def _state_granules(graph: onnx.GraphProto) -> None:
    """Reshape what was padded by ``-side % granule`` to ``(side + granule - 1) // granule * granule``.

    The image has these sides already. But TensorRT-RTX 1.7 does not see that halving them leaves no
    remainder, and so refuses to build for a range of sizes ("Resize shape dims should be non-negative").
    """
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        amounts = producers.get(node.input[1]) if node.op_type == "Pad" else None
        if amounts is None:
            continue
        # The last two of the amounts are those below and to the right; each a remainder, made a list of one.
        remainders = [producers[producers[amount].input[0]] for amount in amounts.input[-2:]]
        if {remainder.op_type for remainder in remainders} != {"Mod"}:
            continue
        name = node.output[0]
        node.output[0] = f"{name}_unstated"
        shape = [f"{name}_batch_and_channels"]
        graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.int64), shape[0]))  # 0: as it is
        flat = numpy_helper.from_array(np.array([-1], np.int64), f"{name}_flat")
        graph.initializer.append(flat)
        for axis, remainder in zip(("height", "width"), remainders, strict=True):
            side, granule = producers[remainder.input[0]].input[1], remainder.input[1]  # of -1 * side
            most = numpy_helper.from_array(constants[granule] - 1, f"{name}_{axis}_most")
            graph.initializer.append(most)
            for operator, operand in (
                ("Add", most.name), ("Div", granule), ("Mul", granule), ("Reshape", flat.name),
            ):  # fmt: skip
                result = f"{name}_{axis}_{operator}"
                nodes.append(helper.make_node(operator, [side, operand], [result], result))
                side = result
            shape.append(side)
        nodes += [
            helper.make_node("Concat", shape, [f"{name}_shape"], f"{name}_shape", axis=0),
            helper.make_node("Reshape", [f"{name}_unstated", f"{name}_shape"], [name], f"{name}_stated"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _to_bytes(cast: onnx.NodeProto) -> bool:
    return any(attribute.name == "to" and attribute.i == TensorProto.UINT8 for attribute in cast.attribute)
