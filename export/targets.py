"""What each target serves, converted from the FP32 stages and compared with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization.calibrate import TensorsData
from torch import Tensor

from export import spec
from export.data.sample import Frames
from export.errors import ExportError
from export.model_config import CPU, FP16, FP32, INT8, TENSORRT
from export.network import MstGan
from export.onnx.cpu import cpu_graph
from export.onnx.fp16 import to_fp16
from export.onnx.int8 import CPU_WEIGHT_LEVEL, TENSORRT_WEIGHT_LEVEL, Feeds, calibrate, quantize_for_cpu
from export.onnx.rounding import rounded_weights, with_weights
from export.onnx.tensorrt import quantize_for_tensorrt, tensorrt_graph
from export.repository import PARENT_KEY, generator_path, parent_digest, sha256, stage_path
from export.tensorrt.gpus import compute_capabilities
from export.tensorrt.plan import build_plan, check_plan, load_library, stage_profile
from export.verify.compare import Comparison, compare_generator

log = logging.getLogger(__name__)

TARGETS = {CPU: INT8, "cuda": FP16, "fp32": FP32}
"""Target -> precision of its generator."""

PLANS = (
    spec.FLOW_ALIGN.name, f"{spec.GENERATOR.name}.{FP16}", f"{spec.GENERATOR.name}.{INT8}",
    spec.PIXEL_SHUFFLE.name,
)  # fmt: skip
"""Graphs that TensorRT compiles: stage, and precision where there is a choice."""


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
        Precision -> ONNX file of every stage; all compute the same.
    """
    chains: dict[str, Mapping[str, Path]] = {FP32: stages}
    if target == CPU:
        source = stages[spec.FLOW_ALIGN.name]
        path = stage_path(folder, spec.FLOW_ALIGN, CPU)
        log.info("converting %s", path)
        _save(cpu_graph(onnx.load(source)), path, source)
        chains[CPU] = {**stages, spec.FLOW_ALIGN.name: path}
    return chains


def build_generator(
    target: str,
    network: MstGan,
    stages: Mapping[str, Path],
    folder: Path,
    calibration: Sequence[Frames],
    *,
    timed: bool = True,
) -> list[Comparison]:
    """Write the target's generator into the build folder and compare it with the FP32 one.

    Args:
        target: one of ``TARGETS``.
        network: what the stages were exported from.
        stages: FP32 ONNX file of every stage.
        folder: build folder.
        calibration: windows to find INT8 ranges on.
        timed: whether to time both.

    Returns:
        The comparison; none where the target serves FP32.
    """
    precision = TARGETS[target]
    if precision == FP32:
        return []
    path = generator_path(folder, precision)
    log.info("converting %s", path)
    fp32 = onnx.load(stages[spec.GENERATOR.name])
    model = to_fp16(fp32) if precision == FP16 else int8_for_cpu(network, fp32, calibration)
    _save(model, path, stages[spec.GENERATOR.name])
    return [compare_generator(precision, path, stages, timed=timed)]


def int8_for_cpu(network: MstGan, fp32: onnx.ModelProto, calibration: Sequence[Frames]) -> onnx.ModelProto:
    """The INT8 generator for ONNX Runtime's CPU provider; arguments as for ``build_generator``."""
    ranges, weights = quantized(network, cpu_graph(fp32), calibration, CPU_WEIGHT_LEVEL)
    return quantize_for_cpu(cpu_graph(with_weights(fp32, weights)), ranges)


def build_for_tensorrt(
    network: MstGan, stages: Mapping[str, Path], folder: Path, calibration: Sequence[Frames]
) -> list[Comparison]:
    """Write what TensorRT compiles: every stage as its parser takes it, the generator in FP16 and INT8.

    Args:
        network: what the stages were exported from.
        stages: FP32 ONNX file of every stage.
        folder: where the graphs go.
        calibration: windows to find INT8 ranges on.

    Returns:
        A comparison with FP32 for each precision of the generator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {stage: tensorrt_graph(onnx.load(path)) for stage, path in stages.items()}
    generator = graphs.pop(spec.GENERATOR.name)
    ranges, weights = quantized(network, generator, calibration, TENSORRT_WEIGHT_LEVEL)
    graphs[f"{spec.GENERATOR.name}.{FP16}"] = to_fp16(generator)
    int8 = quantize_for_tensorrt(with_weights(generator, weights), ranges)
    graphs[f"{spec.GENERATOR.name}.{INT8}"] = to_fp16(int8)
    for name in PLANS:
        _save(graphs[name], folder / f"{name}.onnx", stages[name.split(".")[0]])
    return [
        compare_generator(precision, generator_path(folder, precision), stages, timed=False)
        for precision in (FP16, INT8)
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


def quantized(
    network: MstGan, model: onnx.ModelProto, calibration: Sequence[Frames], level: int
) -> tuple[TensorsData, dict[str, Tensor]]:
    """Ranges of the graph's activations, and the network's weights rounded to +-``level``."""
    with _one_thread():
        feeds = [_feeds(network, window) for window in calibration]
        return calibrate(model, feeds), rounded_weights(network.generator, map(_inputs, feeds), level)


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
