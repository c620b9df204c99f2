"""Stages rewritten in the operators that ONNX Runtime's CPU provider is fast at.

320x180, one thread of an AVX-512 machine, 2026-11-26: flow_align falls from 22.8 ms to 14.4, warps being most
of it. Warps and shuffles were a quarter of the INT8 generator before they were rewritten; colors, blocks and
the rest make another 4 of 107 ms (pruned), and a quarter less memory for activations.

The graph is rewritten, and not exported from modules that are written so: torch's exporter works out shapes
that ONNX leaves open, gathers by 64-bit indices, and would have to write each stage a second time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, parser

from export import spec
from export.errors import ExportError
from export.onnx.cpu_functions import DOMAIN, FUNCTIONS

FOURS = 4  # input channels that ONNX Runtime's 8-bit convolution takes at once
SHUFFLE = 2  # the generator's shuffles double the sides
FEW = 4  # channels of an image up to which a warp goes through its planes, not through its pixels

GRID = ["Unsqueeze", "Sub", "Div", "Add", "Mul"]
"""From a coordinate of ``grid_sample`` back to a place in pixels, as ``network.flow`` makes the one of the
other: the first input of the last."""


def cpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite warps, shuffles and rounding of a stage.

    Raises:
        ExportError: a pattern that every stage has was not found: the exporter writes it otherwise now.
    """
    model = copy.deepcopy(model)
    graph = model.graph
    _depth_to_space(graph)
    _sample_places(graph)
    _round_at_once(graph)
    _add_by_colors(graph)
    _share_by_rows(graph)
    _read_at_once(graph)
    _move_bytes(graph)
    _read_in_blocks(graph)
    _read_in_fours(graph)
    _drop_unread(graph)
    _check_rewritten(graph)
    model.functions.extend(parser.parse_function(text) for text in FUNCTIONS)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model = inliner.inline_local_functions(model)
    for index, node in enumerate(model.graph.node):  # what quantizes the graph refers to nodes by name
        node.name = node.name or f"{node.op_type}_{index}"
    del model.graph.value_info[:]  # what the shuffles' tensors were before
    return onnx.shape_inference.infer_shapes(model)


def _depth_to_space(graph: onnx.GraphProto) -> None:
    """Conv -> DepthToSpace (-> Relu): order the filters anew, and clip before the pixels move."""
    producers = _producers(graph)
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
            conv.input[index] = f"{name}.reordered"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(new), conv.input[index]))
        channels = old.shape[0] // SHUFFLE**2
        _call(node, "DepthToSpace", taller=[0, 0, -1, SHUFFLE * channels], wider=[0, 0, -1, channels])
        relu = next((n for n in graph.node if n.op_type == "Relu" and n.input[0] == node.output[0]), None)
        if relu is not None and readers[node.output[0]] == 1:
            # Commutes with the shuffle, and is free behind a convolution.
            relu.op_type, node.op_type = node.op_type, relu.op_type
            relu.domain, node.domain = node.domain, relu.domain
            relu.attribute.extend(node.attribute)
            del node.attribute[:]


def _sample_places(graph: onnx.GraphProto) -> None:
    """GridSample of a grid from places in pixels: sample at the places."""
    producers = _producers(graph)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    for node in [node for node in graph.node if node.op_type == "GridSample"]:
        attributes = _attributes(node)
        mode = attributes.pop("mode", None)
        grid = producers.get(node.input[1])
        coordinates = grid.input if grid else []
        chains = [_chain(producers[name], GRID, producers) for name in coordinates if name in producers]
        if attributes != {"padding_mode": b"border", "align_corners": 0} or not chains or not all(chains):
            continue
        function = "SamplePlanes" if shapes[node.output[0]][1].dim_value <= FEW else "SamplePixels"
        node.input[1:] = [chain[-1].input[0] for chain in chains]
        _call(node, "NearestInPlanes" if mode == b"nearest" else function)


def _round_at_once(graph: onnx.GraphProto) -> None:
    """What is scaled or shifted, rounded and cast to bytes: one QuantizeLinear, not passes over floats.

    It divides by 1/255: of a frame's millions of values, the dozen that lie on the edge of two levels may go
    to the other.
    """
    producers = _producers(graph)
    constants = scalars(graph)
    for cast in [node for node in graph.node if node.op_type == "Cast"]:
        if chain := _chain(cast, ["Cast", "Round", "Mul", "Clip"], producers):
            level, zero = 1 / constants[chain[2].input[1]], 0.0
        elif (chain := _chain(cast, ["Cast", "Round", "Add"], producers)) and chain[2].input[1] in constants:
            level, zero = 1.0, constants[chain[2].input[1]]
        else:
            continue
        source = chain[-1].input[0]
        cast.op_type, cast.input[:] = "QuantizeLinear", [source, *_levels(graph, cast.output[0], level, zero)]
        del cast.attribute[:]


def _add_by_colors(graph: onnx.GraphProto) -> None:
    """Convolution of the skip connection, addition and rounding: one color after the other."""
    producers = _producers(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for rounding in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        chain = _chain(rounding, ["QuantizeLinear", "Add"], producers)
        head, skip = chain[-1].input if chain else ("", "")
        conv = producers.get(skip)
        if conv is None or conv.op_type != "Conv" or _attributes(conv)["group"] != spec.CHANNELS:
            continue
        frame, kernel = conv.input
        kernels = {
            f"{kernel}_{index}": part for index, part in enumerate(np.split(weights[kernel], spec.CHANNELS))
        }
        graph.initializer.extend(numpy_helper.from_array(part, name) for name, part in kernels.items())
        rounding.input[:] = [head, frame, *kernels, *rounding.input[1:]]
        _call(rounding, "AddByColors")


def _share_by_rows(graph: onnx.GraphProto) -> None:
    """Rows of sub-pixels times shares of columns, viewed as channels, rounded: one row after the other."""
    producers = _producers(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for rounding in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        chain = _chain(rounding, ["QuantizeLinear", "Reshape", "Reshape", "Mul", "Unsqueeze"], producers)
        if not chain:
            continue
        _, view, _, product, rows = chain
        columns = producers.get(product.input[1])
        axes = [list(weights.get(node.input[1], ())) for node in (rows, columns) if node]
        if axes != [[2], [1]]:
            continue
        product.input.extend(rounding.input[1:])
        _call(product, "ShareByRows")
        view.output[0] = rounding.output[0]
        graph.node.remove(rounding)


def _read_at_once(graph: onnx.GraphProto) -> None:
    """Bytes cast, / 255, perhaps less the neutral one: one DequantizeLinear, and 8-bit layers need none."""
    producers = _producers(graph)
    constants = scalars(graph)
    for operators in (["Sub", "Div", "Cast"], ["Div", "Cast"]):
        for last in [node for node in graph.node if node.op_type == operators[0]]:
            chain = _chain(last, operators, producers)
            if not chain or last.input[1] not in constants:
                continue
            white = constants[chain[-2].input[1]]
            neutral = constants[last.input[1]] * white if len(operators) > 2 else 0.0
            reading = _levels(graph, last.output[0], 1 / white, neutral)
            last.op_type, last.input[:] = "DequantizeLinear", [chain[-1].input[0], *reading]


def _move_bytes(graph: onnx.GraphProto) -> None:
    """DequantizeLinear, then only moved: move the bytes, a quarter as many, and read them afterwards."""
    for read in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        moves = [node for node in graph.node if read.output[0] in node.input]
        if any(node.op_type not in ("Reshape", "Gather", "Split") for node in moves):
            continue
        for move in moves:
            move.input[0] = read.input[0]
            for index, moved in enumerate(move.output):
                move.output[index] = f"{moved}_bytes"
                node = helper.make_node("DequantizeLinear", [move.output[index], *read.input[1:]], [moved])
                graph.node.insert(list(graph.node).index(move) + 1, node)
        graph.node.remove(read)


def _read_in_blocks(graph: onnx.GraphProto) -> None:
    """A convolution of frames at stride 2: of blocks of 2x2 pixels, at stride 1.

    The provider's 8-bit convolution goes tap by tap, and of three channels there is little to do at a tap: of
    twelve, with a quarter of the taps, 7x7 to 16 channels takes half the time.
    """
    producers = _producers(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for conv in [node for node in graph.node if node.op_type == "Conv" and node.input[1] in weights]:
        chain = _chain(conv, ["Conv", "DequantizeLinear", "Reshape", "Transpose"], producers)
        if not chain:
            continue
        attributes, (_, read, view, planes) = _attributes(conv), chain
        filters = numpy_helper.to_array(weights[conv.input[1]])
        c_out, c_in, size, _ = filters.shape
        before = size // 2
        regular = {"kernel_shape": [size, size], "strides": [2, 2], "pads": [before] * 4}
        if not attributes.items() >= regular.items() or _attributes(planes) != {"perm": [0, 1, 4, 2, 3]}:
            continue
        first = before % 2  # taps start within a block
        blocks = (first + size + 1) // 2
        rest = 2 * blocks - size - first
        filters = np.pad(filters, ((0, 0), (0, 0), (first, rest), (first, rest)))
        filters = filters.reshape(c_out, c_in, blocks, 2, blocks, 2).transpose(0, 3, 5, 1, 2, 4)
        filters = np.ascontiguousarray(filters).reshape(c_out, 4 * c_in, blocks, blocks)
        weights[conv.input[1]].CopyFrom(numpy_helper.from_array(filters, conv.input[1]))
        start = (before + first) // 2
        changed = {"kernel_shape": [blocks, blocks], "strides": [1, 1]}
        changed["pads"] = [start, start, blocks - 1 - start, blocks - 1 - start]
        del conv.attribute[:]
        conv.attribute.extend(helper.make_attribute(*named) for named in (attributes | changed).items())

        blocked = f"{view.output[0]}_in_blocks"
        node = helper.make_node("InBlocks", [planes.input[0], view.input[1]], [blocked], domain=DOMAIN)
        node.attribute.append(helper.make_attribute("pairs", [0, 0, 0, -1, 2 * c_in]))
        graph.node.insert(list(graph.node).index(read), node)
        read.input[0] = blocked


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
        if not missing or filters.shape[1] < FOURS:  # of one four alone, the fast one is the slower
            continue
        widened = np.pad(filters, ((0, 0), (0, missing), (0, 0), (0, 0)))
        weights[conv.input[1]].CopyFrom(numpy_helper.from_array(widened, conv.input[1]))
        source = read.input[0]
        first, wide = f"{source}_first", f"{source}_in_fours"
        nodes = [
            _first_channels(graph, source, missing, first),
            helper.make_node("Concat", [source, first], [wide], axis=1),
        ]
        read.input[0] = wide
        for node in nodes:
            graph.node.insert(list(graph.node).index(read), node)


def head_first(graph: onnx.GraphProto) -> None:
    """Have a quantized generator's head computed before the skip connection that is added to it.

    Of the nodes that feed a node, ONNX Runtime begins with the last in the file. Left alone, that is a
    color's skip connection, and its floats are kept through the whole network. So the answer's last channels
    become an empty slice of the head's. To be called when the nodes have their places.

    Raises:
        ExportError: the graph ends otherwise than a quantized generator.
    """
    last = graph.node[-1]
    operators = [
        "Concat", "QuantizeLinear", "Add", "DequantizeLinear", "QuantizeLinear", "Split", "DequantizeLinear",
    ]  # fmt: skip
    chain = _chain(last, operators, _producers(graph))
    if not chain:
        raise ExportError(
            f"expected a quantized generator to end with {' <- '.join(operators)}, found {last.op_type} "
            f"{last.name!r} made otherwise; adapt export/onnx/cpu.py to the exporter"
        )
    head = chain[-1].input[0]
    nothing = f"{head}_none"
    graph.node.insert(len(graph.node) - 1, _first_channels(graph, head, 0, nothing))
    last.input.append(nothing)


def _first_channels(graph: onnx.GraphProto, source: str, count: int, answer: str) -> onnx.NodeProto:
    """A node that slices them off, to be put in its place; its bounds are in the graph already."""
    bounds = {f"{answer}_start": 0, f"{answer}_end": count, f"{answer}_axis": 1}
    graph.initializer.extend(
        numpy_helper.from_array(np.array([bound]), name) for name, bound in bounds.items()
    )
    return helper.make_node("Slice", [source, *bounds], [answer], answer)


def _check_rewritten(graph: onnx.GraphProto) -> None:
    """Refuse a stage in which something expected was not found, and so would run as slowly as before."""
    producers = _producers(graph)
    values = (*graph.input, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in graph.node:
        attributes = _attributes(node)
        source = producers.get(node.input[0]) if node.input else None
        slow = (
            node.op_type == "GridSample"
            or (node.op_type == "DepthToSpace" and attributes.get("blocksize") == SHUFFLE)
            or (node.op_type == "Cast" and TensorProto.UINT8 in (attributes["to"], types.get(node.input[0])))
            or (
                node.op_type == "Conv"
                and attributes.get("strides") == [2, 2]
                and source is not None
                and source.op_type == "DequantizeLinear"
            )
        ) and not node.domain
        if slow:
            raise ExportError(_NOT_FOUND.format(f"{node.op_type} {node.name!r} in a form that is rewritten"))
    ends = {spec.FLOW_ALIGN: "ShareByRows", spec.GENERATOR: "AddByColors"}
    calls = {node.op_type for node in graph.node if node.domain == DOMAIN}
    for stage, function in ends.items():
        names = {tensor.name for tensor in stage.outputs}
        if names == {value.name for value in graph.output} and function not in calls:
            raise ExportError(_NOT_FOUND.format(f"what {function} of {stage.name} stands for"))


_NOT_FOUND = (
    "expected {}, found none such: the exporter writes it otherwise now, and the stage would be "
    "slower than it can be; adapt export/onnx/cpu.py, or export with --target fp32"
)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """What computed the grids, and constants that nothing refers to any more."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def _chain(
    last: onnx.NodeProto, operators: Sequence[str], producers: Mapping[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """A node, what makes its first input, and so on, if these are their operators; else nothing."""
    chain: list[onnx.NodeProto] = []
    node: onnx.NodeProto | None = last
    for operator in operators:
        if node is None or node.op_type != operator:
            return []
        chain.append(node)
        node = producers.get(node.input[0])
    return chain


def scalars(graph: onnx.GraphProto) -> dict[str, float]:
    """The numbers among a graph's constants."""
    return {
        tensor.name: float(numpy_helper.to_array(tensor)) for tensor in graph.initializer if not tensor.dims
    }


def _levels(graph: onnx.GraphProto, name: str, level: float, zero: float) -> list[str]:
    """Add scale and zero point of bytes to a graph; gives their names."""
    values = {f"{name}_level": np.float32(level), f"{name}_zero": np.uint8(np.rint(zero))}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in values.items())
    return list(values)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _call(node: onnx.NodeProto, function: str, **attributes: list[int]) -> None:
    node.domain, node.op_type = DOMAIN, function
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
