"""From a network to ONNX: one file per stage, any batch, any size."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from export import spec
from export.network import MstGan
from export.repository import stage_path

log = logging.getLogger(__name__)
# torch's exporter warns of operators of packages that we do not use; importing torch has set its level.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

EXAMPLE_BATCH = 2  # any but 1, which the exporter would take for a constant
EXAMPLE_SIZE = (
    68,
    132,
)  # lr; odd multiples of 4, so that odd levels are traced; no level of 1 px

TORCH_TYPES = {"UINT8": torch.uint8, "FP16": torch.float16, "FP32": torch.float32}


def export_onnx(network: MstGan, folder: Path) -> dict[str, Path]:
    """Write the three stages of a network.

    Returns:
        Model name -> file, in the ensemble's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for stage in spec.STAGES:
        paths[stage.name] = stage_path(folder, stage)
        log.info("exporting %s", paths[stage.name])
        export_stage(network.get_submodule(stage.name), stage, paths[stage.name])
    return paths


def export_stage(module: nn.Module, stage: spec.ModelSpec, path: Path) -> None:
    """Write one stage."""
    example = tuple(
        torch.zeros(tensor.shape(EXAMPLE_BATCH, EXAMPLE_SIZE), dtype=TORCH_TYPES[tensor.dtype])
        for tensor in stage.inputs
    )
    write_graph(module, stage, path, example, _dynamic_shapes(stage.inputs))


def write_graph(
    module: nn.Module,
    stage: spec.ModelSpec,
    path: Path,
    example: tuple[Tensor, ...],
    shapes: tuple[dict[int, Dim], ...],
) -> None:
    """Trace a module on an example and write its graph.

    Args:
        module: What the stage computes.
        stage: Names of inputs and outputs.
        path: The file.
        example: A tensor for each input.
        shapes: Of each, axis -> what it may be.
    """
    with warnings.catch_warnings():
        # torch's exporter warns about its own internals (Python's copyreg, renamed dimensions).
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            example,
            path,
            input_names=[tensor.name for tensor in stage.graph_inputs],
            output_names=[tensor.name for tensor in stage.graph_outputs],
            opset_version=spec.OPSET,
            dynamic_shapes=shapes,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    _forget_source(path)


def _forget_source(path: Path) -> None:
    """Drop torch's notes on each node: stack traces with paths of this machine, other in every checkout.

    Without them the same weights give the same bytes, which is how later conversions know their parent.
    """
    model = onnx.load(path)
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, path)


def _dynamic_shapes(tensors: tuple[spec.TensorSpec, ...]) -> tuple[dict[int, Dim], ...]:
    """Per tensor: axis -> symbol, sides written as multiples of the coarsest tensor's."""
    batch = Dim("batch", min=1, max=spec.MAX_BATCH)
    bounds = (
        (low // spec.FLOW_STRIDE, 2 * high // spec.FLOW_STRIDE)
        for low, high in zip(spec.LR_SIZES[0], spec.LR_SIZES[-1], strict=True)
    )
    sides = [Dim(name, min=low, max=high) for name, (low, high) in zip(("h4", "w4"), bounds, strict=True)]
    shapes = []
    for tensor in tensors:
        free = [axis for axis, dim in enumerate(tensor.dims, start=1) if dim == -1]
        factor = spec.FLOW_STRIDE * tensor.scale // tensor.stride
        shape = {axis: side if factor == 1 else factor * side for axis, side in zip(free, sides, strict=True)}
        shapes.append({0: batch, **shape})
    return tuple(shapes)
