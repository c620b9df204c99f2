"""Graphs for ONNX Runtime's CPU provider compute what they were made from, in other operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, parser
from onnx_sessions import feeds, run, session

from export import spec
from export.errors import ExportError
from export.network.flow import backward_warp, nearest_sample
from export.onnx.cpu import cpu_graph, head_first
from export.onnx.cpu_functions import DOMAIN, FUNCTIONS

pytestmark = pytest.mark.slow

Array = np.ndarray
FUNCTION = {parsed.name: parsed for parsed in map(parser.parse_function, FUNCTIONS)}


def call(function: str, inputs: dict[str, Array]) -> Array:
    """Run one of the functions on its own."""
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in inputs.items()
    ]
    output = helper.make_tensor_value_info("sampled", onnx.TensorProto.FLOAT, None)
    node = helper.make_node(function, list(inputs), ["sampled"], domain=DOMAIN)
    model = helper.make_model(
        helper.make_graph([node], "g", values, [output]),
        opset_imports=[helper.make_opsetid("", spec.OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[FUNCTION[function]],
        ir_version=9,
    )
    return run(model, inputs)


def places(flow: torch.Tensor) -> dict[str, Array]:
    """Where a flow (N, 2, h, w) points, in pixels."""
    height, width = flow.shape[-2:]
    x = torch.arange(width) + flow[:, 0]
    y = torch.arange(height).unsqueeze(1) + flow[:, 1]
    return {"x": x.numpy(), "y": y.numpy()}


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0, 1000.0])
@pytest.mark.parametrize("size", [(7, 10), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(("function", "channels"), [("SamplePlanes", 3), ("SamplePixels", 8)])
def test_a_warp_samples_between_pixels(
    function: str, channels: int, size: tuple[int, int], spread: float
) -> None:
    torch.manual_seed(1)
    image, flow = torch.rand(2, channels, *size), spread * torch.randn(2, 2, *size)
    found = call(function, {"image": image.numpy(), **places(flow)})
    np.testing.assert_allclose(found, backward_warp(image, flow), atol=2e-5)


@pytest.mark.parametrize("spread", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("size", [(7, 10), (1, 5), (5, 1)])
def test_the_nearest_sample_is_a_sample(size: tuple[int, int], spread: float) -> None:
    torch.manual_seed(1)
    image, flow = torch.rand(2, 2, *size), spread * torch.randn(2, 2, *size)
    found = call("NearestInPlanes", {"image": image.numpy(), **places(flow.round())})
    np.testing.assert_array_equal(found, nearest_sample(image, flow)[0])


@pytest.mark.parametrize("lr_size", [(20, 36), (36, 20)])
@pytest.mark.parametrize("stage", [spec.FLOW_ALIGN, spec.GENERATOR], ids=lambda stage: stage.name)
def test_a_stage_stays_the_same_function(built: Path, stage: spec.ModelSpec, lr_size: spec.Size) -> None:
    model = onnx.load(built / "build" / f"{stage.name}.onnx")
    rewritten = cpu_graph(model)
    onnx.checker.check_model(rewritten, full_check=True)
    operators = {node.op_type for node in rewritten.graph.node}
    assert not operators & {"GridSample", "DepthToSpace"}
    read = {name for node in rewritten.graph.node for name in node.input}
    assert read.issuperset(tensor.name for tensor in rewritten.graph.initializer)

    inputs = feeds(lr_size, batch=2)
    inputs = {tensor.name: inputs[tensor.name] for tensor in stage.inputs}
    outputs = zip(session(rewritten).run(None, inputs), session(model).run(None, inputs), strict=True)
    for tensor, (found, wanted) in zip(stage.outputs, outputs, strict=True):
        difference = np.abs(found.astype(float) - wanted)
        if tensor == spec.ALIGNED:  # a level may fall to either side, a sample be either of two neighbors
            assert np.mean(difference > 1) < 1e-3
            assert np.mean(difference) < 0.01
        else:
            assert difference.max() <= {spec.SUBPIXELS: 1, spec.FLOW: 1e-3}[tensor]


def test_strided_convolutions_read_blocks(built: Path) -> None:
    graph = cpu_graph(onnx.load(built / "build/generator.onnx")).graph
    (stem,) = (node for node in graph.node if "encoder.stem.weight" in node.input)
    attributes = {a.name: helper.get_attribute_value(a) for a in stem.attribute}
    assert attributes["kernel_shape"] == [4, 4]
    assert attributes["strides"] == [1, 1]


def test_neighbors_samples_are_shared_out_a_row_at_a_time(built: Path) -> None:
    """Floats of all sixteen sub-pixels would be half of what the stage needs at its peak."""
    graph = cpu_graph(onnx.load(built / "build/flow_align.onnx")).graph
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    products = [node for node in graph.node if node.op_type == "Mul" and rounded.intersection(node.output)]
    assert len(products) == spec.SCALE


FORMS = {
    "a grid that is not made of places": """
        g (float[1, 2, 4, 4] x, float[1, 4, 4, 2] grid) => (float[1, 2, 4, 4] y) {
            y = GridSample <mode = "bilinear", padding_mode = "border", align_corners = 0> (x, grid)
        }""",
    "sub-pixels in another order": """
        g (float[1, 8, 4, 4] x) => (float[1, 2, 8, 8] y) {
            y = DepthToSpace <blocksize = 2, mode = "DCR"> (x)
        }""",
    "bytes that are cut off, not rounded": """
        g (float[1, 8, 4, 4] x) => (uint8[1, 8, 4, 4] y) {
            y = Cast <to = 2> (x)
        }""",
    "images that are not scaled": """
        g (uint8[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y) {
            y = Cast <to = 1> (x)
        }""",
    "a generator without its end": """
        g (uint8[1, 48, 4, 4] x) => (uint8[1, 48, 4, 4] subpixels) {
            subpixels = Identity (x)
        }""",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_not_rewritten_is_an_error(form: str) -> None:
    """It stands for an exporter that one day writes the stages otherwise."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {FORMS[form]}')
    with pytest.raises(ExportError, match=r"found none such: .* adapt export/onnx/cpu.py"):
        cpu_graph(model)


def test_a_quantized_graph_of_another_end_is_an_error(built: Path) -> None:
    model = onnx.load(built / "build/generator.onnx")
    with pytest.raises(ExportError, match=r"expected a quantized generator to end with .*, found Cast"):
        head_first(model.graph)
