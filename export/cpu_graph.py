"""An ONNX stage in, the same function in the operators that ONNX Runtime's CPU provider is fast at, out.

Profiled once on the pruned generator's INT8 graph, 320x180, one thread of a busy AVX-512 machine: the two
warps fall from 12 ms to 1.5; the two shuffles take 6 ms before, and afterwards all transposes of the graph
together 1.5, less than without them (2.5). The whole falls from 78 ms to 62.
"""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, parser

DOMAIN = "mst_gan"  # of the functions below, until they are inlined
FOURS = 4  # input channels that ONNX Runtime's 8-bit convolution takes at once
SHUFFLE = 2  # the generator's shuffles double the sides

# GridSample(bilinear, border, align_corners=0) of an image as large as its grid. The provider's kernel works
# out the coordinates once per channel; here they are worked out once, and whole pixels of all channels are
# gathered, in 8 bits where the image is quantised.
SAMPLE = """
<domain: "mst_gan", opset_import: ["": 18]>
Sample (image, grid) => (warped) {
    zero = Constant <value = float {0}> ()
    half = Constant <value = float {0.5}> ()
    one = Constant <value = float {1}> ()
    shape = Shape (grid)
    side_axes = Constant <value_ints = [2, 1]> ()
    sides_int = Gather (shape, side_axes)
    sides = Cast <to = 1> (sides_int)
    last = Sub (sides, one)

    from_zero = Add (grid, one)
    doubled = Mul (from_zero, sides)
    twice = Sub (doubled, one)
    position = Mul (twice, half)
    above = Max (position, zero)
    inside = Min (above, last)
    near = Floor (inside)
    beyond = Add (near, one)
    far = Min (beyond, last)
    far_share = Sub (inside, near)
    near_share = Sub (one, far_share)

    x_axis = Constant <value_ints = [0]> ()
    y_axis = Constant <value_ints = [1]> ()
    near_int = Cast <to = 7> (near)
    far_int = Cast <to = 7> (far)
    x0 = Gather <axis = -1> (near_int, x_axis)
    y0 = Gather <axis = -1> (near_int, y_axis)
    x1 = Gather <axis = -1> (far_int, x_axis)
    y1 = Gather <axis = -1> (far_int, y_axis)
    columns = Concat <axis = -1> (x0, x1, x0, x1)
    rows = Concat <axis = -1> (y0, y0, y1, y1)
    x_int = Constant <value_int = 0> ()
    y_int = Constant <value_int = 1> ()
    width = Gather (sides_int, x_int)
    height = Gather (sides_int, y_int)
    row_starts = Mul (rows, width)
    in_image = Add (row_starts, columns)
    area = Mul (height, width)
    batch_axis = Constant <value_int = 0> ()
    batch = Gather (shape, batch_axis)
    step = Constant <value_int = 1> ()
    numbers = Range (batch_axis, batch, step)
    starts = Mul (numbers, area)
    four_axes = Constant <value_ints = [-1, 1, 1, 1]> ()
    image_starts = Reshape (starts, four_axes)
    corners = Add (in_image, image_starts)

    wx0 = Gather <axis = -1> (near_share, x_axis)
    wy0 = Gather <axis = -1> (near_share, y_axis)
    wx1 = Gather <axis = -1> (far_share, x_axis)
    wy1 = Gather <axis = -1> (far_share, y_axis)
    wx = Concat <axis = -1> (wx0, wx1, wx0, wx1)
    wy = Concat <axis = -1> (wy0, wy0, wy1, wy1)
    shares = Mul (wx, wy)
    row_axis = Constant <value_ints = [3]> ()
    share_rows = Unsqueeze (shares, row_axis)

    channels_last = Transpose <perm = [0, 2, 3, 1]> (image)
    pixels = Flatten <axis = 3> (channels_last)
    neighbours = Gather <axis = 0> (pixels, corners)
    mixed = MatMul (share_rows, neighbours)
    mixed_pixels = Squeeze (mixed, row_axis)
    warped = Transpose <perm = [0, 3, 1, 2]> (mixed_pixels)
}
"""

# DepthToSpace(blocksize 2) of channels ordered (row, column, channel). The provider has no 8-bit
# DepthToSpace; next to channels-last convolutions the outer transposes merge, and what stays moves runs of
# bytes. No Shape: it would have the whole tensor turned to float first.
WEAVE = """
<domain: "mst_gan", opset_import: ["": 18]>
Weave <taller, wider> (packed) => (woven) {
    columns = Transpose <perm = [0, 3, 2, 1]> (packed)
    taller_shape = Constant <value_ints: ints = @taller> ()
    rows_split = Reshape (columns, taller_shape)
    rows = Transpose <perm = [0, 2, 1, 3]> (rows_split)
    wider_shape = Constant <value_ints: ints = @wider> ()
    pixels = Reshape (rows, wider_shape)
    woven = Transpose <perm = [0, 3, 1, 2]> (pixels)
}
"""


def cpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite warps, shuffles and rounding; what does not match the patterns stays as it is."""
    model = copy.deepcopy(model)
    _weave_shuffles(model.graph)
    _round_at_once(model.graph)
    _read_at_once(model.graph)
    _read_in_fours(model.graph)
    for node in model.graph.node:
        if node.op_type == "GridSample" and _attributes(node) == {
            "mode": b"bilinear", "padding_mode": b"border", "align_corners": 0,
        }:  # fmt: skip
            _call(node, "Sample")
    model.functions.extend(parser.parse_function(text) for text in (SAMPLE, WEAVE))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model = inliner.inline_local_functions(model)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    for index, node in enumerate(model.graph.node):  # what quantises the graph refers to nodes by name
        node.name = node.name or f"{node.op_type}_{index}"
    del model.graph.value_info[:]  # what the shuffles' tensors were before
    return onnx.shape_inference.infer_shapes(model)


def _weave_shuffles(graph: onnx.GraphProto) -> None:
    """Conv -> DepthToSpace (-> Relu): order the filters anew, and clip before the pixels move."""
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "DepthToSpace" or _attributes(node) != {"blocksize": SHUFFLE, "mode": b"CRD"}:
            continue
        conv = producers.get(node.input[0])
        if conv is None or conv.op_type != "Conv" or readers[node.input[0]] > 1:
            continue
        for index, name in enumerate(conv.input[1:], start=1):
            old = numpy_helper.to_array(weights[name])
            new = old.reshape(-1, SHUFFLE**2, *old.shape[1:]).swapaxes(0, 1).reshape(old.shape)
            if readers[name] == 1:
                graph.initializer.remove(weights[name])
            conv.input[index] = f"{name}.woven"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(new), conv.input[index]))
        channels = old.shape[0] // SHUFFLE**2
        _call(node, "Weave", taller=[0, 0, -1, SHUFFLE * channels], wider=[0, 0, -1, channels])
        relu = next((n for n in graph.node if n.op_type == "Relu" and n.input[0] == node.output[0]), None)
        if relu is not None and readers[node.output[0]] == 1:
            # Commutes with the shuffle, and is free behind a convolution.
            relu.op_type, node.op_type = node.op_type, relu.op_type
            relu.domain, node.domain = node.domain, relu.domain
            relu.attribute.extend(node.attribute)
            del node.attribute[:]


def _round_at_once(graph: onnx.GraphProto) -> None:
    """Clip to 0..1, * 255, round, cast to bytes: one QuantizeLinear, in place of four passes over floats.

    It divides by 1/255: of a frame's millions of values, the dozen that lie on the edge of two levels may go
    to the other.
    """
    rounding = list(graph.node)[-4:]
    if [node.op_type for node in rounding] != ["Clip", "Mul", "Round", "Cast"]:
        return
    level = numpy_helper.from_array(np.array(1 / 255, np.float32), "grey_level")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "black")
    graph.initializer.extend([level, zero])
    del graph.node[-4:]
    source, target = rounding[0].input[0], rounding[-1].output
    graph.node.append(helper.make_node("QuantizeLinear", [source, level.name, zero.name], target))


def _read_at_once(graph: onnx.GraphProto) -> None:
    """Bytes cast, / 255, less the neutral byte's share: one DequantizeLinear; 8-bit layers need none."""
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for shift in [node for node in graph.node if node.op_type == "Sub"]:
        chain = [shift]
        while chain[-1].input[0] in producers and readers[chain[-1].input[0]] == 1:
            chain.append(producers[chain[-1].input[0]])
        second_inputs = (node.input[1] if len(node.input) > 1 else "" for node in chain[:2])
        neutral, white = (constants.get(name) for name in second_inputs)
        if [node.op_type for node in chain] != ["Sub", "Div", "Cast"] or neutral is None or white is None:
            continue
        name = chain[-1].input[0]
        levels = {
            f"{name}_level": np.float32(1 / white),
            f"{name}_neutral": np.uint8(np.rint(neutral * white)),
        }
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(level), key) for key, level in levels.items()
        )
        shift.op_type, shift.input[:] = "DequantizeLinear", [name, *levels]
        for node in chain[1:]:
            graph.node.remove(node)


def _read_in_fours(graph: onnx.GraphProto) -> None:
    """Bytes -> DequantizeLinear -> Conv: repeat channels up to a multiple of 4, with weights of 0.

    The provider's fast 8-bit convolution takes no other number; its slow one takes twice the time.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "Conv"}
    for read in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        conv = readers.get(read.output[0])
        if conv is None or conv.input[1] not in weights:
            continue
        filters = numpy_helper.to_array(weights[conv.input[1]])
        missing = -filters.shape[1] % FOURS
        if not missing:
            continue
        widened = np.pad(filters, ((0, 0), (0, missing), (0, 0), (0, 0)))
        weights[conv.input[1]].CopyFrom(numpy_helper.from_array(widened, conv.input[1]))
        source = read.input[0]
        bounds = {f"{source}_start": 0, f"{source}_end": missing, f"{source}_axis": 1}
        graph.initializer.extend(
            numpy_helper.from_array(np.array([bound]), name) for name, bound in bounds.items()
        )
        first, wide = f"{source}_first", f"{source}_in_fours"
        nodes = [
            helper.make_node("Slice", [source, *bounds], [first]),
            helper.make_node("Concat", [source, first], [wide], axis=1),
        ]
        read.input[0] = wide
        for node in reversed(nodes):
            graph.node.insert(list(graph.node).index(read), node)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _call(node: onnx.NodeProto, function: str, **attributes: list[int]) -> None:
    node.domain, node.op_type = DOMAIN, function
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
