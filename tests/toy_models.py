"""Three small ONNX files of the served contract: nearest x4 plus a little detail from every input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export import spec

# Work enough that requests queue up while one runs: tens of milliseconds for a 64x64 frame.
DETAIL_WIDTH = 32
DETAIL_LAYERS = 6
Array = np.ndarray[Any, Any]
BLOCK = spec.SCALE**2  # subpixels of one channel

ONNX_TYPES = {"UINT8": TensorProto.UINT8, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT}


BATCH_WITNESS_CONFIG = """
backend: "onnxruntime"
max_batch_size: 4
input { name: "anything" data_type: TYPE_FP32 dims: [1] }
output { name: "batch" data_type: TYPE_INT64 dims: [1] }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 2000000 }
"""


BUSY_CONFIG = """
backend: "onnxruntime"
input { name: "rounds" data_type: TYPE_INT64 dims: [1] }
output { name: "done" data_type: TYPE_INT64 dims: [1] }
instance_group { count: 1 kind: KIND_CPU }
"""


def build_toy_models(folder: Path) -> None:
    """Write ``<stage>.onnx`` for every stage of the contract."""
    for stage, nodes, constants in (
        (spec.FLOW_ALIGN, *_flow_align()),
        (spec.GENERATOR, *_generator()),
        (spec.PIXEL_SHUFFLE, *_pixel_shuffle()),
    ):
        save_model(
            folder / f"{stage.name}.onnx",
            nodes,
            [value_info(tensor) for tensor in stage.inputs],
            [value_info(tensor) for tensor in stage.outputs],
            constants,
        )


def add_batch_witness(repository: Path) -> None:
    """Add the model ``batch_witness``, whose every answer is the batch of the ONNX run that it came from.

    Triton's own counters cannot tell: they count what it hands to the backend, not what that runs.
    """
    model = repository / "batch_witness"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(BATCH_WITNESS_CONFIG)
    nodes = [
        helper.make_node("Shape", ["anything"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["size"]),
        helper.make_node("Expand", ["size", "shape"], ["batch"]),
    ]
    save_model(
        model / "1/model.onnx",
        nodes,
        [helper.make_tensor_value_info("anything", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor_value_info("batch", TensorProto.INT64, ["N", 1])],
        {"first": np.array([0])},
    )


def build_busy_repository(repository: Path) -> None:
    """Make a repository of one model, ``busy``: works the rounds that it is asked for, and answers with them.

    One instance, which starts quickly and can be kept at work: 10 000 rounds are half a second or more.
    """
    model = repository / "busy"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(BUSY_CONFIG)
    matrix = helper.make_tensor_value_info("matrix", TensorProto.FLOAT, [64, 64])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_on"], ["goes_on"]),
            helper.make_node("MatMul", ["matrix", "turn"], ["turned"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, []),
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            matrix,
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("turned", TensorProto.FLOAT, [64, 64]),
        ],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32)[::-1].copy(), "turn")],
    )
    nodes = [
        helper.make_node("Squeeze", ["rounds"], ["count"]),
        helper.make_node("Loop", ["count", "", "start"], ["end"], body=body),
        helper.make_node("ReduceSum", ["end"], ["sum"], keepdims=0),  # 0: kept, so that the loop is
        helper.make_node("Cast", ["sum"], ["nothing"], to=TensorProto.INT64),
        helper.make_node("Add", ["rounds", "nothing"], ["done"]),
    ]
    save_model(
        model / "1/model.onnx",
        nodes,
        [helper.make_tensor_value_info("rounds", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("done", TensorProto.INT64, [1])],
        {"start": np.zeros((64, 64), np.float32)},
    )


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, Array],
) -> None:
    """Check a graph and write it."""
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", spec.OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def value_info(tensor: spec.TensorSpec) -> onnx.ValueInfoProto:
    """Of any batch and size."""
    dims = ["N", *(f"{tensor.name}_{axis}" if d == -1 else d for axis, d in enumerate(tensor.dims))]
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], dims)


def _flow_align() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Frames to NCHW, and as often again as there is room; the "flow" is their mean over each flow pixel."""
    copies = -(-spec.ALIGNED.dims[0] // spec.CHANNELS)
    nodes = [
        helper.make_node("Transpose", ["lr_window"], ["planes"], perm=[0, 1, 4, 2, 3]),
        *(
            helper.make_node("Gather", ["planes", f"frame_{i}"], [f"nchw_{i}"], axis=1)
            for i in range(spec.WINDOW)
        ),
        helper.make_node("Concat", [f"nchw_{i % spec.WINDOW}" for i in range(copies)], ["many"], axis=1),
        helper.make_node("Slice", ["many", "zero", "aligned_channels", "axis_1"], ["aligned"]),
        helper.make_node("Slice", ["many", "zero", "flow_channels", "axis_1"], ["flow_bytes"]),
        helper.make_node("Cast", ["flow_bytes"], ["flow_levels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["flow_levels", "white"], ["flow_source"]),
        helper.make_node(
            "AveragePool",
            ["flow_source"],
            ["flow"],
            kernel_shape=[spec.FLOW_STRIDE] * 2,
            strides=[spec.FLOW_STRIDE] * 2,
        ),
    ]
    constants = {
        "white": np.array(255, np.float32),
        **{f"frame_{i}": np.array(i) for i in range(spec.WINDOW)},
        "axis_1": np.array([1]),
        "zero": np.array([0]),
        "flow_channels": np.array([spec.FLOW.dims[0]]),
        "aligned_channels": np.array([spec.ALIGNED.dims[0]]),
    }
    return nodes, constants


def _generator() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Center frame repeated to subpixels, plus detail from the rest.

    Sides that are no multiple of the flow's stride fail at the Concat, as they may in the real network.
    """
    rng = np.random.default_rng(0)
    constants = {
        "center": np.array(spec.WINDOW // 2),
        "white": np.array(255, np.float32),
        "repeat": np.repeat(np.eye(spec.CHANNELS, dtype=np.float32), BLOCK, axis=0)[:, :, None, None],
        "stride": np.array([1, 1, spec.FLOW_STRIDE, spec.FLOW_STRIDE], np.float32),
        "small": np.array(0.05, np.float32),
        "black": np.array(0, np.float32),
        "one": np.array(1, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["lr_window", "center"], ["frame"], axis=1),
        helper.make_node("Cast", ["frame"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["levels", "white"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "repeat"], ["nearest"]),
        helper.make_node("Resize", ["flow", "", "stride"], ["flow_full"], mode="nearest"),
        helper.make_node("Cast", ["aligned"], ["aligned_levels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["aligned_levels", "white"], ["aligned_scaled"]),
        helper.make_node("Concat", ["flow_full", "aligned_scaled"], ["detail_0"], axis=1),
    ]
    width_in = spec.FLOW.dims[0] + spec.ALIGNED.dims[0]
    for layer in range(DETAIL_LAYERS):
        width_out = spec.SUBPIXELS.dims[0] if layer == DETAIL_LAYERS - 1 else DETAIL_WIDTH
        constants[f"weight_{layer}"] = rng.normal(
            0, np.sqrt(2 / (9 * width_in)), (width_out, width_in, 3, 3)
        ).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [f"detail_{layer}", f"weight_{layer}"], [f"conv_{layer}"], pads=[1] * 4),
            helper.make_node("Tanh", [f"conv_{layer}"], [f"detail_{layer + 1}"]),
        ]
        width_in = width_out
    nodes += [
        helper.make_node("Mul", [f"detail_{DETAIL_LAYERS}", "small"], ["detail"]),
        helper.make_node("Add", ["nearest", "detail"], ["unbounded"]),
        helper.make_node("Clip", ["unbounded", "black", "one"], ["clipped"]),
        helper.make_node("Mul", ["clipped", "white"], ["bytes"]),
        helper.make_node("Round", ["bytes"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["subpixels"], to=TensorProto.UINT8),
    ]
    return nodes, constants


def _pixel_shuffle() -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        helper.make_node("DepthToSpace", ["subpixels"], ["hr_planes"], blocksize=spec.SCALE, mode="CRD"),
        helper.make_node("Transpose", ["hr_planes"], ["hr_frame"], perm=[0, 2, 3, 1]),
    ]
    return nodes, {}
