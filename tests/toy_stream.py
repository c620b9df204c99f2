"""A recurrent network small enough to check by hand: every answer tells all frames that came before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper
from toy_models import build_toy_models, save_model, value_info

from export import repository, spec

Array = np.ndarray[Any, Any]
FACTOR, STEP = 5, 3  # of what is remembered


def history(frames: Iterable[Array], remembered: int = 0) -> Iterator[Array]:
    """What the toy answers to (H, W, 3) uint8 frames of one sequence.

    It remembers a number, to which each frame's first byte adds; the answer is half the frame, four times as
    large, plus half of that number.
    """
    for frame in frames:
        remembered = (FACTOR * remembered + int(frame[0, 0, 0]) + STEP) % 256
        yield (frame // 2 + remembered // 2).repeat(4, axis=0).repeat(4, axis=1)


def sequence_answers(
    images: Sequence[Array], segment: int, warmup: int, cuts: Collection[int] = ()
) -> list[Array]:
    """What a client gets that cuts a clip into sequences as long as segments.

    Each begins ``warmup`` frames early, but not before a cut.
    """
    answers, begin, shot = [], 0, 0
    for t in range(len(images)):
        shot = t if t in cuts else shot
        begin = t if t % segment == 0 or t in cuts else begin
        first = max(shot, begin - warmup)
        answers.append(list(history(images[first : t + 1]))[-1])
    return answers


def stream_repository(folder: Path) -> Path:
    """A repository that serves the toy as ``mst_gan_stream``."""
    build, models = folder / "build", folder / "model_repository"
    build.mkdir(parents=True)
    build_toy_models(build)
    for stage, (nodes, constants) in ((spec.STREAM_ALIGN, _align()), (spec.STREAM_GENERATOR, _generator())):
        inputs, outputs = (list(map(value_info, side)) for side in (stage.graph_inputs, stage.graph_outputs))
        save_model(build / f"{stage.name}.onnx", nodes, inputs, outputs, constants)
    repository.install_stream(build, models, repository.Weights("toy_stream", "1" * 64))
    return models


def _nodes(*rows: tuple[Any, ...]) -> list[NodeProto]:
    """Operator, inputs, output, attributes."""
    return [
        helper.make_node(operator, inputs.split(), [output], **(rest[0] if rest else {}))
        for operator, inputs, output, *rest in rows
    ]


def _align() -> tuple[list[NodeProto], dict[str, Array]]:
    channels = spec.STREAM_ALIGNED.dims[0]
    nodes = _nodes(
        ("Transpose", "lr_frame", "planes", {"perm": [0, 3, 1, 2]}),
        ("Concat", " ".join(["planes"] * -(-channels // 3)), "many", {"axis": 1}),
        ("Slice", "many zero channels one", "aligned"),
        ("Slice", "many zero two one", "pair"),
        ("Cast", "pair", "floats", {"to": TensorProto.FLOAT}),
        ("AveragePool", "floats", "flow", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Shape", "previous", "sides"),
        ("Slice", "sides one two", "rows"),
        ("Slice", "sides two three", "columns"),
        ("Concat", "batch rows", "by_rows", {"axis": 0}),
        ("Concat", "batch columns", "by_columns", {"axis": 0}),
        ("Expand", "start by_rows", "start_rows"),
        ("Expand", "start by_columns", "start_columns"),
        ("Identity", "lr_frame", "next_previous"),
    )
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "channels": channels, "batch": 1}
    return nodes, {name: np.array([number]) for name, number in numbers.items()}


def _generator() -> tuple[list[NodeProto], dict[str, Array]]:
    nodes = _nodes(
        ("Slice", "aligned zeros corner_3 axes", "frame"),
        ("Cast", "frame", "levels", {"to": TensorProto.FLOAT}),
        ("Slice", "levels zeros corner_1 axes", "first"),
        ("Slice", "state zeros corner_1 axes", "kept"),
        ("Cast", "kept", "known", {"to": TensorProto.FLOAT}),
        ("Slice", "start_rows zero one one", "begins"),
        ("Unsqueeze", "begins back", "begins_here"),
        ("Greater", "begins_here nought", "is_first"),
        ("Where", "is_first nought known", "remembered"),
        ("Mul", "remembered factor", "more"),
        ("Sum", "more first step", "sum"),
        ("Mod", "sum bytes", "number", {"fmod": 1}),
        ("Shape", "levels", "shape"),
        ("Slice", "shape zero one zero", "batch"),
        ("Slice", "shape two four zero", "sides"),
        ("Concat", "batch state_channels sides", "next_shape", {"axis": 0}),
        ("Expand", "number next_shape", "everywhere"),
        ("Cast", "everywhere", "next_state", {"to": TensorProto.UINT8}),
        ("Mul", "number half", "half_number"),
        ("Floor", "half_number", "added"),
        ("Mul", "levels half", "half_levels"),
        ("Floor", "half_levels", "dimmed"),
        ("Add", "dimmed added", "answer"),
        ("Conv", "answer work", "worked", {"pads": [4] * 4}),
        ("Mul", "worked nought", "nothing"),
        ("ReduceSum", "nothing", "no_sum"),
        ("Conv", "answer repeat", "subpixels_float"),
        ("Add", "subpixels_float no_sum", "subpixels_all"),
        ("Cast", "subpixels_all", "subpixels", {"to": TensorProto.UINT8}),
    )
    lists = {
        "zeros": [0, 0, 0], "axes": [1, 2, 3], "corner_1": [1, 1, 1], "corner_3": [3, 1 << 30, 1 << 30],
        "zero": [0], "one": [1], "two": [2], "four": [4], "back": [2, 3],
        "state_channels": [spec.STATE_CHANNELS],
    }  # fmt: skip
    floats = {"nought": 0, "factor": FACTOR, "step": STEP, "bytes": 256, "half": 0.5}
    repeat = np.repeat(np.eye(3, dtype=np.float32), spec.PHASES, axis=0)[:, :, None, None]
    return nodes, {
        **{name: np.array(values) for name, values in lists.items()},
        **{name: np.array(value, np.float32) for name, value in floats.items()},
        "repeat": repeat,
        "work": np.ones((64, 3, 9, 9), np.float32),  # so that requests wait, and batches come about
    }
