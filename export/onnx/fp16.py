"""FP32 generator in, the same graph computing in FP16 out; what passes its boundary keeps its type.

Precision is a property of the graph: TensorRT 11 has no flag for it, and a strongly typed build takes it from
here. FP32 stay the flow, the positions computed from it, the sampling itself and the frames' way to 0..1.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.onnx.int8 import image_nodes, position_nodes

OPSET = 19  # the first whose QuantizeLinear takes FP16; GridSample changes in 20 only
FLOAT_INPUTS = {"Resize": (0,)}  # operator -> inputs that have the data's type, where not all floats do
SCALES = {("QuantizeLinear", 1), ("DequantizeLinear", 1)}  # operator and input
SMALLEST = np.finfo(np.float16).smallest_subnormal


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert every node that may lose precision, with casts where the types meet."""
    model = onnx.shape_inference.infer_shapes(copy.deepcopy(model))
    graph = model.graph
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, OPSET)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    values = (*graph.input, *graph.value_info, *graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {name for name, t in initializers.items() if t.data_type == TensorProto.FLOAT}
    stays = {node.name for node in (*position_nodes(graph), *image_nodes(graph))}

    types = {value.name: TensorProto.FLOAT for value in graph.input}
    types |= dict.fromkeys(initializers, TensorProto.FLOAT)
    casts: dict[tuple[str, int], str] = {}
    scales: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def as_type(name: str, wanted: int) -> str:
        if types[name] == wanted:
            return name
        if (name, wanted) not in casts:
            casts[name, wanted] = f"{name}_{TensorProto.DataType.Name(wanted).lower()}"
            if name in initializers:
                array = numpy_helper.to_array(initializers[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(array, casts[name, wanted]))
            else:
                nodes.append(helper.make_node("Cast", [name], [casts[name, wanted]], to=wanted))
        return casts[name, wanted]

    for node in graph.node:
        single = node.name in stays or node.op_type in ("GridSample", "Cast", "Range")
        wanted = TensorProto.FLOAT if single else TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if name in floats and index in FLOAT_INPUTS.get(node.op_type, (index,)):
                node.input[index] = as_type(name, wanted)
                if name in initializers and (node.op_type, index) in SCALES:
                    scales.add(node.input[index])
        types |= dict.fromkeys(node.output, wanted)
        nodes.append(node)
    for output in graph.output:
        if types[output.name] != TensorProto.FLOAT:
            nodes.append(_cast_output(nodes, output.name))

    for tensor in graph.initializer:
        if tensor.name in scales:  # of a filter that is all but zero; TensorRT refuses a scale that is
            array = np.maximum(numpy_helper.to_array(tensor), SMALLEST)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


def _cast_output(nodes: list[onnx.NodeProto], name: str) -> onnx.NodeProto:
    """Rename what makes the output, so that its cast can have the name."""
    half = f"{name}_float16"
    for node in nodes:
        node.input[:] = [half if entry == name else entry for entry in node.input]
        node.output[:] = [half if entry == name else entry for entry in node.output]
    return helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT)
