"""From a recurrent network to ONNX: its stages with a state, any size of frame and state; INT8 for CPUs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QDQQuantizer, QuantType
from torch import Tensor
from torch.export import Dim

from export import spec
from export.data.sample import Frames
from export.model_config import INT8
from export.network.stream import StreamNetwork
from export.onnx.cpu import cpu_graph
from export.onnx.export import EXAMPLE_BATCH, EXAMPLE_SIZE, TORCH_TYPES, export_stage, write_graph
from export.onnx.int8 import CPU_WEIGHT_LEVEL, Feeds, calibrate
from export.onnx.rounding import rounded_weights, with_weights
from export.repository import PARENT_KEY, sha256, stage_path

log = logging.getLogger(__name__)

EXAMPLE_STATE: spec.Size = (20, 28)  # any but the frame's: the state's sides are its own
LAYERS = ("stem.", "fuse.", "body.", "head.")
"""Whose convolutions are quantized: all but the gate's and bicubic's."""


def export_stream(network: StreamNetwork, folder: Path) -> dict[str, Path]:
    """Write the three stages of a recurrent network.

    Returns:
        Model name -> file, in the ensemble's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for stage in spec.STREAM_STAGES:
        paths[stage.name] = stage_path(folder, stage)
        log.info("exporting %s", paths[stage.name])
        _export(network, stage, paths[stage.name])
    shuffle = spec.PIXEL_SHUFFLE
    paths[shuffle.name] = stage_path(folder, shuffle)
    export_stage(network.pixel_shuffle, shuffle, paths[shuffle.name])
    return paths


def convert_for_cpu(
    network: StreamNetwork, stages: Mapping[str, Path], folder: Path, windows: Iterable[Frames]
) -> dict[str, Path]:
    """Write what a CPU serves: the aligner in its fast operators, and the generator in INT8.

    Args:
        network: what the stages were exported from.
        stages: FP32 ONNX file of every stage.
        folder: where the two go, as ``<stage>.int8.onnx``.
        windows: (1, T, H, W, 3) uint8 each, to find ranges on.

    Returns:
        Model name -> file, in the ensemble's order.
    """
    paths = {stage.name: stage_path(folder, stage, INT8) for stage in spec.STREAM_STAGES}
    align, generator = (onnx.load(stages[name]) for name in paths)
    feeds = feeds_of((window[0] for window in windows), stages)
    converted = cpu_graph(align), int8_stream_generator(network, generator, feeds)
    for (name, path), model in zip(paths.items(), converted, strict=True):
        log.info("converting %s", path)
        onnx.helper.set_model_props(model, {PARENT_KEY: sha256(stages[name])})
        onnx.save(model, path)
    return {**stages, **paths}


def int8_stream_generator(
    network: StreamNetwork, stream_generator: onnx.ModelProto, feeds: Iterable[Feeds]
) -> onnx.ModelProto:
    """The INT8 generator for ONNX Runtime's CPU provider: its convolutions, what stands between in floats.

    Args:
        network: what the stage was exported from.
        stream_generator: its FP32 graph.
        feeds: what it is given over sequences, to find ranges on; see ``feeds_of``.
    """
    # The calibrator's histograms keep the steps of the first feed: a state of zeros, as of a first frame,
    # would make them so fine that the next range takes gigabytes.
    feeds = sorted(feeds, key=lambda feed: bool(feed[spec.START_ROWS.name].any()))
    ranges = calibrate(cpu_graph(stream_generator), feeds)
    names = [tensor.name for tensor in spec.STREAM_GENERATOR.graph_inputs]
    inputs = ([torch.from_numpy(feed[name]) for name in names] for feed in feeds)
    weights = rounded_weights(network.stream_generator, inputs, CPU_WEIGHT_LEVEL)
    model = copy.deepcopy(cpu_graph(with_weights(stream_generator, weights)))
    quantizer = QDQQuantizer(
        model, True, True, QuantType.QInt8, QuantType.QUInt8, ranges,
        list(_quantized_nodes(model.graph)), [], ["Conv", "Relu", "Add"], {},
    )  # fmt: skip  # as in quantize_for_cpu
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def feeds_of(sequences: Iterable[Frames], stages: Mapping[str, Path]) -> Iterator[Feeds]:
    """What the generator is given for every frame of some sequences, its state included.

    Args:
        sequences: (T, H, W, 3) uint8 each.
        stages: FP32 ONNX file of every stage.
    """
    for sequence in sequences:
        runner = StreamRunner(stages)
        for frame in sequence:
            yield runner.feed(frame)
            runner.finish()


class StreamRunner:
    """The served stages in ONNX Runtime on a CPU, with the states that Triton keeps between them."""

    def __init__(self, stages: Mapping[str, Path], threads: int = 1) -> None:
        """Load the stages; the next frame starts a sequence."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._sessions = {
            name: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for name, path in stages.items()
        }
        self.reset()

    def reset(self) -> None:
        """Have the next frame start a sequence."""
        self._states = {
            stage.state.input.name: np.zeros(stage.state.input.shape(1, (1, 1)), np.uint8)
            for stage in spec.STREAM_STAGES
        }
        self._start = 1.0
        self._feed: Feeds = {}

    def feed(self, lr_frame: Frames) -> Feeds:
        """Align a (H, W, 3) uint8 frame; what the generator is given for it."""
        inputs = {
            spec.LR_FRAME.name: lr_frame[np.newaxis],
            spec.START.name: np.full((1, 1), self._start, np.float32),
        }
        aligned = self._run(spec.STREAM_ALIGN, inputs)
        self._start = 0.0
        state = spec.STREAM_GENERATOR.state.input.name
        self._feed = {**aligned, state: self._states[state]}
        return self._feed

    def finish(self) -> Frames:
        """The (4H, 4W, 3) uint8 answer to the frame that was fed last."""
        subpixels = self._run(spec.STREAM_GENERATOR, self._feed)
        session = self._sessions[spec.PIXEL_SHUFFLE.name]
        answer: Frames = session.run(None, subpixels)[0][0]
        return answer

    def upscale(self, lr_frame: Frames) -> Frames:
        """The answer to the next frame."""
        self.feed(lr_frame)
        return self.finish()

    def _run(self, stage: spec.StreamSpec, inputs: Mapping[str, Any]) -> Feeds:
        """Outputs of a stage; its state is kept."""
        state = stage.state
        names = [tensor.name for tensor in stage.graph_outputs]
        feed = {**inputs, state.input.name: self._states[state.input.name]}
        outputs = dict(zip(names, self._sessions[stage.name].run(names, feed), strict=True))
        self._states[state.input.name] = outputs.pop(state.output.name)
        return outputs


def _quantized_nodes(graph: onnx.GraphProto) -> Iterator[str]:
    """Convolutions of ``LAYERS``, and what is done to their answers alone."""
    constants = {tensor.name for tensor in graph.initializer}
    inside: set[str] = set()
    for node in graph.node:
        is_layer = node.op_type == "Conv" and node.input[1].startswith(LAYERS)
        is_between = node.op_type in ("Relu", "Add") and not set(node.input) - constants - inside
        if is_layer or is_between:
            inside.update(node.output)
            yield node.name


def _export(network: StreamNetwork, stage: spec.StreamSpec, path: Path) -> None:
    example, shapes = zip(*(_example(tensor, stage) for tensor in stage.graph_inputs), strict=True)
    write_graph(network.get_submodule(stage.name), stage, path, example, shapes)


def _example(tensor: spec.TensorSpec, stage: spec.StreamSpec) -> tuple[Tensor, dict[int, Dim]]:
    """A tensor of zeros, and which of its axes are free.

    The state's sides have names of their own: ONNX Runtime shares memory between tensors whose sides have one
    name, and a state may be of one pixel.
    """
    free = [axis for axis, dim in enumerate(tensor.dims, start=1) if dim == -1]
    shape: dict[int, Dim] = {0: Dim("batch", min=1, max=spec.MAX_BATCH)}
    sides = {spec.START_ROWS: 0, spec.START_COLUMNS: 1}
    if tensor in sides or tensor == stage.state.input:
        first = sides.get(tensor, 0)
        size = EXAMPLE_STATE if not first else EXAMPLE_STATE[::-1]
        names = ("state_h", "state_w")[first:]
        shape |= {axis: Dim(name, min=2, max=4096) for axis, name in zip(free, names, strict=False)}
    else:
        size = EXAMPLE_SIZE
        factor = spec.MULTIPLE_OF // tensor.stride
        units = [Dim(name, min=4, max=1024) for name in ("h4", "w4")]
        shape |= {axis: factor * unit for axis, unit in zip(free, units, strict=False)}
    return torch.zeros(tensor.shape(EXAMPLE_BATCH, size), dtype=TORCH_TYPES[tensor.dtype]), shape
