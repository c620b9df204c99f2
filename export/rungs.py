"""FP32 stages in, the generator of a target's precision out: converted, judged, named after its rung."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization.calibrate import TensorsData
from torch import Tensor

from export import spec
from export.cpu_graph import cpu_graph
from export.data.sample import Frames, reduced_windows
from export.errors import ExportError
from export.fp16 import to_fp16
from export.gates import Verdict, judge_generator
from export.gpus import compute_capabilities
from export.model_config import CPU, FP16, FP32, INT8, TENSORRT
from export.network import MstGan
from export.plan import build_plan, check_plan, load_library, stage_profile
from export.quantize import (
    CPU_WEIGHT_LEVEL,
    TABLE,
    TENSORRT_WEIGHT_LEVEL,
    Feeds,
    calibrate,
    chosen_float,
    quantise_for_cpu,
    sensitivity,
    write_table,
)
from export.repository import PARENT_KEY, generator_path, parent_digest, sha256, stage_path
from export.rounding import rounded_weights, with_weights
from export.tensorrt_graph import quantise_for_tensorrt, tensorrt_graph

log = logging.getLogger(__name__)

TARGETS = {CPU: INT8, "cuda": FP16, "fp32": FP32}
"""Target -> the rung that its generator stands on."""

PLANS = (
    spec.FLOW_ALIGN.name, f"{spec.GENERATOR.name}.{FP16}", f"{spec.GENERATOR.name}.{INT8}",
    spec.PIXEL_SHUFFLE.name,
)  # fmt: skip
"""Graphs that TensorRT compiles: stage, and precision where there is a choice."""

INT8_BUDGET_DB = 0.15
"""What all quantised layers together may cost by the sensitivity table: half as much again as the tolerance
allows, for the table overrates it. A layer in float costs more than it saves: with its noisiest in float the
pruned network took 118 ms in place of 105 and lost 0.056 dB in place of 0.058 (`make export`, 2026-11-27)."""
SENSITIVITY_FRAME = 100  # of the sample clip: neither calibrated on nor judged on


def default_target() -> str:
    """The target of the machine at hand."""
    return "cuda" if compute_capabilities() else "cpu"


def check_target(target: str) -> None:
    """Refuse a target that cannot be built here, before any work is done."""
    if target not in (*TARGETS, TENSORRT):
        raise ExportError(
            f"expected --target to be one of {', '.join((*TARGETS, TENSORRT))}, found {target!r}"
        )
    if target != TENSORRT:
        return
    if not compute_capabilities():
        raise ExportError(
            "expected an NVIDIA GPU for --target tensorrt, which builds plans on the GPU that runs them, "
            "found none; what can be built here: plans for TensorRT-RTX by `make plans`, or ONNX files for "
            "GPUs by `make export TARGET=cuda`"
        )
    load_library(TENSORRT)


def chains_of(target: str, stages: Mapping[str, Path], folder: Path) -> dict[str, Mapping[str, Path]]:
    """The chains of FP32 stages that a target serves or starts from, written into the build folder.

    Args:
        target: one of ``TARGETS``, or TensorRT.
        stages: FP32 ONNX file of every stage.
        folder: build folder.

    Returns:
        Rung -> ONNX file of every stage; all compute the same.
    """
    chains: dict[str, Mapping[str, Path]] = {FP32: stages}
    if target == CPU:
        source = stages[spec.FLOW_ALIGN.name]
        path = stage_path(folder, spec.FLOW_ALIGN, CPU)
        log.info("converting %s", path)
        _save(cpu_graph(onnx.load(source)), path, source)
        chains[CPU] = {**stages, spec.FLOW_ALIGN.name: path}
    return chains


def build_rung(
    target: str,
    network: MstGan,
    stages: Mapping[str, Path],
    folder: Path,
    calibration: Sequence[Frames],
    *,
    judge_speed: bool = True,
) -> list[Verdict]:
    """Write the target's generator into the build folder and judge it.

    Args:
        target: one of ``TARGETS``.
        network: what the stages were exported from.
        stages: FP32 ONNX file of every stage.
        folder: build folder.
        calibration: windows to find INT8 ranges on.
        judge_speed: whether to time it against its parent.

    Returns:
        A verdict per step from FP32.
    """
    rung = TARGETS[target]
    if rung == FP32:
        return []
    path = generator_path(folder, rung)
    log.info("converting %s", path)
    fp32 = onnx.load(stages[spec.GENERATOR.name])
    model = to_fp16(fp32) if rung == FP16 else _int8_for_cpu(network, fp32, folder, calibration)
    _save(model, path, stages[spec.GENERATOR.name])
    return [judge_generator(rung, path, FP32, stages, judge_speed=judge_speed)]


def build_for_tensorrt(
    network: MstGan, stages: Mapping[str, Path], folder: Path, calibration: Sequence[Frames]
) -> list[Verdict]:
    """Write what TensorRT compiles: every stage as its parser takes it, the generator in FP16 and INT8.

    Args:
        network: what the stages were exported from.
        stages: FP32 ONNX file of every stage.
        folder: where the graphs and the sensitivity table go.
        calibration: windows to find INT8 ranges on.

    Returns:
        A verdict per precision of the generator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {stage: tensorrt_graph(onnx.load(path)) for stage, path in stages.items()}
    generator = graphs.pop(spec.GENERATOR.name)
    chosen = _decide(network, generator, folder, calibration, symmetric=True)
    graphs[f"{spec.GENERATOR.name}.{FP16}"] = to_fp16(generator)
    rounded = with_weights(generator, chosen.weights)
    graphs[f"{spec.GENERATOR.name}.{INT8}"] = to_fp16(
        quantise_for_tensorrt(rounded, chosen.ranges, chosen.left_float)
    )
    for name in PLANS:
        _save(graphs[name], folder / f"{name}.onnx", stages[name.split(".")[0]])
    return [
        judge_generator(rung, generator_path(folder, rung), FP32, stages, judge_speed=False)
        for rung in (FP16, INT8)
    ]


def build_plans(
    library: str, graphs: Path, out: Path, stages: Mapping[str, Path], gpus: Sequence[str] = (),
    *, only_check: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Compile every graph of ``PLANS``, or only refuse plans that no longer fit.

    Args:
        library: one of ``plan.LIBRARIES``.
        graphs: folder that ``build_for_tensorrt`` has filled.
        out: where the plans go, their identities, and the timing cache.
        stages: FP32 ONNX file of every stage.
        gpus: compute capabilities, for TensorRT-RTX.
        only_check: build nothing.

    Returns:
        Name as in ``PLANS`` -> plan.
    """
    plans = {}
    for name in PLANS:
        source, plan = graphs / f"{name}.onnx", out / f"{name}.plan"
        stage = next(stage for stage in spec.STAGES if stage.name == name.split(".")[0])
        profile = stage_profile(stage)
        if not only_check:
            build_plan(library, source, plan, profile, gpus, out / "timing.cache")
        check_plan(library, source, plan, profile, gpus)
        check_parent(source, stages[stage.name])
        plans[name] = plan
    return plans


def check_parent(source: Path, fp32: Path) -> None:
    """Refuse a graph that was converted from another FP32 graph than this."""
    if parent_digest(source) != sha256(fp32):
        raise ExportError(
            f"expected {source} to come from {fp32}, found that it comes from an older export; "
            "rebuild it with `python -m export plans`"
        )


def _save(model: onnx.ModelProto, path: Path, parent: Path) -> None:
    """Write a converted graph, and in it which FP32 file it comes from."""
    onnx.helper.set_model_props(model, {PARENT_KEY: sha256(parent)})
    onnx.save(model, path)


@dataclass(frozen=True)
class _Quantisation:
    """What becomes 8-bit, and how."""

    ranges: TensorsData
    """Of the activations."""
    left_float: Sequence[str]
    """Convolutions, by the network's names."""
    weights: Mapping[str, Tensor]
    """Of all others, rounded."""


def _int8_for_cpu(
    network: MstGan, fp32: onnx.ModelProto, folder: Path, calibration: Sequence[Frames]
) -> onnx.ModelProto:
    chosen = _decide(network, cpu_graph(fp32), folder, calibration, symmetric=False)
    rounded = cpu_graph(with_weights(fp32, chosen.weights))
    return quantise_for_cpu(rounded, chosen.ranges, chosen.left_float)


def _decide(
    network: MstGan, model: onnx.ModelProto, folder: Path, calibration: Sequence[Frames], *, symmetric: bool
) -> _Quantisation:
    """Ranges, weights, and layers to leave in float; the table of why goes into the folder."""
    with _one_thread():
        seen = [_feeds(network, window) for window in calibration]
        ranges = calibrate(model, seen)
        weights = rounded_weights(
            network.generator, map(_inputs, seen), TENSORRT_WEIGHT_LEVEL if symmetric else CPU_WEIGHT_LEVEL
        )
        lr_window, truth = reduced_windows(SENSITIVITY_FRAME, 1)
        inputs = _inputs(_feeds(network, lr_window))
        layers = sensitivity(network.generator, model, ranges, weights, inputs, symmetric=symmetric)
        with torch.inference_mode():
            answer = network.pixel_shuffle(network.generator(*inputs)).numpy()
    parent_error = float(np.mean((answer / 255.0 - truth / 255.0) ** 2))
    left_float = chosen_float(layers, parent_error, INT8_BUDGET_DB)
    write_table(folder / TABLE, layers, left_float, INT8_BUDGET_DB)
    log.info(
        "%d of %d convolutions in INT8; noisiest: %s", len(layers) - len(left_float), len(layers),
        ", ".join(f"{layer.name} {layer.psnr_db:.1f} dB" for layer in layers[:3]),
    )  # fmt: skip
    return _Quantisation(
        ranges, left_float, {name: weight for name, weight in weights.items() if name not in left_float}
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small frames lose more to waiting for a second thread than it gains them: on busy cores ten times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _feeds(network: MstGan, lr_window: Frames) -> Feeds:
    """What the generator is given for a window."""
    with torch.inference_mode():
        flow, aligned = network.flow_align(torch.from_numpy(lr_window))
    return {
        spec.LR_WINDOW.name: lr_window,
        spec.FLOW.name: flow.numpy(),
        spec.ALIGNED.name: aligned.numpy(),
    }


def _inputs(feeds: Feeds) -> list[Tensor]:
    """The same for PyTorch."""
    return [torch.from_numpy(feeds[tensor.name]) for tensor in spec.GENERATOR.inputs]
