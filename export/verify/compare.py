"""Compare exported stages with what they were made from, on real frames, under committed tolerances.

Three questions, one form of answer: do FP32 graphs compute what PyTorch does (``compare_stages``), what does
a lower precision cost (``compare_generator``), and do TensorRT plans compute what their graphs do
(``compare_plans``: some versions choose wrong kernels, NVIDIA/TensorRT#4646).
"""

from __future__ import annotations

import json
import logging
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export import spec
from export.data.sample import Frames, reduced_windows, sample_windows
from export.errors import ExportError
from export.metrics.psnr_ssim import psnr_y
from export.metrics.tof import Flow, flows, tof
from export.model_config import FP16, FP32, INT8
from export.network import MstGan
from export.tensorrt.runner import run_plan

log = logging.getLogger(__name__)

TOLERANCES = Path(__file__).with_name("tolerances.toml")
REPORT = "parity.json"
EQUAL_DB = 200.0  # PSNR of what does not differ

CASES: tuple[tuple[int, spec.Size], ...] = ((4, (68, 160)), (1, (180, 320)))
"""Batch and lr size of stages: a full batch whose deeper levels are all odd, and a frame of a usual shape."""
# Of the sample clip, after what calibration saw. A single spot flatters: INT8 sums that saturate cost 1.1 dB
# at the first and 0.2 dB at the fourth, but 0.004 dB at the third.
SPOTS, FRAMES = (67, 110, 130, 164, 200), 3
USUAL_SIZE: spec.Size = (180, 320)  # lr; large enough that arithmetic decides a speed and not overhead
ROUNDS = 7  # timed, of both generators in turn, so that a busy machine slows both

AT_LEAST = {"psnr_db"}  # measures with a lower limit; the others have an upper one
WORDS = {
    "psnr_db": "is {:.1f} dB from its reference (at least {:g})",
    "max_error": "differs by up to {:.3g} (at most {:g})",
    "psnr_loss_db": "loses {:.3f} dB (at most {:g})",
    "tof_gain_px": "flickers {:.4f} px more (at most {:g})",
}

Tensors = dict[str, NDArray[Any]]
Runner = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Comparison:
    """One subject against its reference: what was measured, and what is tolerated."""

    stage: str
    precision: str
    reference: str
    measured: Mapping[str, float]
    """By name, as in ``WORDS``."""
    limits: Mapping[str, float]
    """Of the same names."""
    tensor: str = ""
    """Where one output of a stage is compared."""
    shape: tuple[int, ...] = ()
    truth_psnr_db: float | None = None
    """Luma, of the whole chain, where the truth is known."""
    ms: float | None = None
    """Median of the generator alone; None where it was not timed."""
    speedup: float | None = None
    """Of the generator, over its reference."""
    least_speedup: float = 0.0
    """To be selected; less is no failure."""

    @property
    def failures(self) -> list[str]:
        """Which tolerances do not hold, for an error message; what is not a finite number never holds."""
        return [
            WORDS[name].format(found, self.limits[name])
            for name, found in self.measured.items()
            if not (
                math.isfinite(found)
                and (found >= self.limits[name] if name in AT_LEAST else found <= self.limits[name])
            )
        ]

    @property
    def fast_enough(self) -> bool:
        """Whether to serve it in place of its reference; true where it was not timed."""
        return self.speedup is None or self.speedup >= self.least_speedup

    @property
    def subject(self) -> str:
        """What is compared."""
        return f"{self.stage}{'.' * bool(self.tensor)}{self.tensor} in {self.precision}"

    def __str__(self) -> str:
        """One line for a log."""
        texts = [
            f"{name} {found:.4g} ({'at least' if name in AT_LEAST else 'at most'} {self.limits[name]:g})"
            for name, found in self.measured.items()
        ]
        texts += [f"{self.truth_psnr_db:.2f} dB of the truth"] if self.truth_psnr_db is not None else []
        texts += [f"{self.ms:.2f} ms"] if self.ms is not None else []
        texts += [f"{self.speedup:.2f}x"] if self.speedup is not None else []
        return f"{self.subject} against {self.reference}: {', '.join(texts)}"


class Report:
    """``parity.json`` of a build folder: every comparison of one run of the command."""

    def __init__(self, folder: Path) -> None:
        """The file is written by the first ``check``."""
        self.path = folder / REPORT
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def check(self, section: str, comparisons: Sequence[Comparison]) -> None:
        """Log comparisons, write them down, and refuse one that is out of tolerance.

        Args:
            section: ``onnx``, ``precisions`` or ``plans``.
            comparisons: its rows.

        Raises:
            ExportError: a tolerance does not hold. One of speed decides what is served: no error.
        """
        self.sections[section] = [
            {**asdict(one), "passed": not one.failures, "fast_enough": one.fast_enough} for one in comparisons
        ]
        self.path.write_text(json.dumps(self.sections, indent=2) + "\n")
        for one in comparisons:
            log.info("%s %s", "FAIL" if one.failures else "ok  ", one)
            if not one.fast_enough:
                log.warning(
                    "%s is rejected: here it is slower than in %s, which is served instead",
                    one.subject, one.reference,
                )  # fmt: skip
        failed = [f"{one.subject} {' and '.join(one.failures)}" for one in comparisons if one.failures]
        if failed:
            raise ExportError(
                f"{ADVICE[section][0]}: {'; '.join(failed)}. Nothing was installed; see {self.path}, "
                f"tolerances in {TOLERANCES}{ADVICE[section][1]}"
            )


ADVICE = {
    "onnx": ("parity with PyTorch does not hold", ""),
    "precisions": ("a lower precision costs too much", "; --target fp32 serves the FP32 generator"),
    "plans": ("plans do not answer as their graphs do", "; try another TensorRT version"),
}
"""Section -> what went wrong, and what else to do."""


def tolerances(*keys: str) -> dict[str, float]:
    """The committed limits of one table, such as ``"precisions", "int8"``."""
    table: Any = tomllib.loads(TOLERANCES.read_text())
    for key in keys:
        table = table[key]
    return dict(table)


def psnr_db(found: NDArray[Any], reference: NDArray[Any], peak: float | None = None) -> float:
    """PSNR, by default against the reference's own range.

    Returns:
        dB; ``EQUAL_DB`` where the two are equal, NaN where either has a value that is not finite.
    """
    error = float(np.mean((found.astype(np.float64) - reference) ** 2))
    if peak is None:
        peak = float(np.ptp(reference.astype(np.float64))) or 1.0
    if not (math.isfinite(error) and math.isfinite(peak)):
        return math.nan
    return min(EQUAL_DB, 10 * math.log10(peak**2 / error)) if error else EQUAL_DB


def onnx_runner(path: Path, threads: int = 0) -> Runner:
    """An ONNX file in ONNX Runtime on the CPU, by default on all cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, outputs = (
        [tensor.name for tensor in side()] for side in (session.get_inputs, session.get_outputs)
    )
    return lambda tensors: dict(
        zip(outputs, session.run(outputs, {name: tensors[name] for name in inputs}), strict=True)
    )


def torch_runner(network: MstGan, stage: spec.ModelSpec) -> Runner:
    """A stage of the network in PyTorch."""
    module = network.get_submodule(stage.name)

    def run(tensors: Tensors) -> Tensors:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(tensors[tensor.name]) for tensor in stage.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: value.numpy() for tensor, value in zip(stage.outputs, outputs, strict=True)}

    return run


def run_chain(lr_window: NDArray[np.uint8], runners: Mapping[str, Runner]) -> Tensors:
    """Every tensor of the ensemble for a batch of windows; ``runners`` by stage."""
    tensors: Tensors = {spec.LR_WINDOW.name: lr_window}
    for stage in spec.STAGES:
        tensors |= runners[stage.name](tensors)
    return tensors


def compare_stages(network: MstGan, chains: Mapping[str, Mapping[str, Path]]) -> list[Comparison]:
    """FP32 stages on PyTorch's own inputs, and whole chains on theirs, against PyTorch.

    Args:
        network: the reference.
        chains: precision -> ONNX file of every stage; files that chains share are compared once.
    """
    references = {stage.name: torch_runner(network, stage) for stage in spec.STAGES}
    runners = {path: onnx_runner(path) for chain in chains.values() for path in chain.values()}
    rows = []
    for batch, lr_size in CASES:
        expected = run_chain(sample_windows(batch, lr_size), references)
        compared: set[Path] = set()
        for precision, chain in chains.items():
            for stage in spec.STAGES:
                path = chain[stage.name]
                if path not in compared:
                    rows += _compare_outputs(stage, precision, runners[path](expected), expected)
                    compared.add(path)
            found = run_chain(expected[spec.LR_WINDOW.name], {s: runners[path] for s, path in chain.items()})
            rows += _compare_outputs(spec.ENSEMBLE, precision, found, expected)
    return rows


def _compare_outputs(
    model: spec.ModelSpec, precision: str, found: Tensors, expected: Tensors
) -> list[Comparison]:
    rows = []
    for tensor in (output.name for output in model.outputs):
        a, b = found[tensor], expected[tensor]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ExportError(
                f"{model.name}.{tensor}: expected {b.dtype} {b.shape}, found {a.dtype} {a.shape}; "
                "the exported graph does not follow export/spec.py"
            )
        worst = float(np.abs(a.astype(np.float64) - b).max())
        measured = {"psnr_db": psnr_db(a, b), "max_error": worst}
        limits = tolerances("onnx", model.name, tensor)
        rows.append(Comparison(model.name, precision, "PyTorch", measured, limits, tensor, a.shape))
    return rows


def compare_generator(
    precision: str, candidate: Path, stages: Mapping[str, Path], *, timed: bool
) -> Comparison:
    """A generator of lower precision against the FP32 one, inside the chain, where the truth is known.

    Args:
        precision: the candidate's, as in the tolerances.
        candidate: ONNX file.
        stages: FP32 ONNX file of every stage.
        timed: whether to time both generators, where the tolerances ask for a speed.
    """
    limits = tolerances("precisions", precision)
    least_speedup = limits.pop("speedup")
    windows, truths, true_flows = zip(*map(_spot, SPOTS), strict=True)
    lr_windows, truth = np.concatenate(windows), np.concatenate(truths)
    # One thread is what one instance of a small server has; more would be noise here.
    parent = {stage: onnx_runner(path, threads=1) for stage, path in stages.items()}
    child = {**parent, spec.GENERATOR.name: onnx_runner(candidate, threads=1)}
    parent_frames, frames = (_upscale(lr_windows, runners) for runners in (parent, child))
    parent_psnr, psnr = (_mean_psnr(images, truth) for images in (parent_frames, frames))
    parent_tofs, tofs = (_tofs(images, true_flows) for images in (parent_frames, frames))
    ms = speedup = None
    if timed and least_speedup:
        window: Tensors = {spec.LR_WINDOW.name: sample_windows(1, USUAL_SIZE)}
        window |= parent[spec.FLOW_ALIGN.name](window)
        parent_ms, ms = _medians_ms([chain[spec.GENERATOR.name] for chain in (parent, child)], window)
        speedup = parent_ms / ms
    measured = {
        "psnr_loss_db": parent_psnr - psnr,
        "max_error": float(np.abs(frames.astype(int) - parent_frames).max()),
        # Median over the spots. In their mean the one counts where somebody fills a dark corner of the
        # picture: the flow there is anyone's guess, and changes by pixels with a quarter of a gray level.
        "tof_gain_px": float(np.median(tofs - parent_tofs)),
    }
    return Comparison(
        spec.GENERATOR.name, precision, FP32, measured, limits,
        truth_psnr_db=psnr, ms=ms, speedup=speedup, least_speedup=least_speedup,
    )  # fmt: skip


def compare_plans(
    library: str, graphs: Mapping[str, Path], plans: Mapping[str, Path], *, timed: bool
) -> list[Comparison]:
    """Chains of plans with a generator in FP16 and in INT8, against the same graphs in ONNX Runtime.

    Args:
        library: that built the plans.
        graphs: name as in ``targets.PLANS`` -> ONNX file.
        plans: the same names -> plan.
        timed: whether their speed decides between the two.
    """
    lr_window = sample_windows(1, USUAL_SIZE)
    times: dict[str, float] = {}

    def plan_runner(name: str, stage: spec.ModelSpec) -> Runner:
        def run(tensors: Tensors) -> Tensors:
            inputs = {tensor.name: tensors[tensor.name] for tensor in stage.inputs}
            outputs, times[name] = run_plan(library, plans[name], inputs)
            return outputs

        return run

    rows = []
    for precision in (FP16, INT8):
        names = {stage: stage.name for stage in spec.STAGES}
        names[spec.GENERATOR] = generator = f"{spec.GENERATOR.name}.{precision}"
        found = run_chain(lr_window, {stage.name: plan_runner(name, stage) for stage, name in names.items()})
        expected = run_chain(lr_window, {stage.name: onnx_runner(graphs[n]) for stage, n in names.items()})
        frames, wanted = (tensors[spec.HR_FRAME.name] for tensors in (found, expected))
        measured = {"psnr_db": psnr_db(frames, wanted, peak=255)}
        fp16_ms = times[f"{spec.GENERATOR.name}.{FP16}"]
        rows.append(
            Comparison(
                "plans", precision, "their graphs", measured, tolerances("plans"), ms=times[generator],
                speedup=fp16_ms / times[generator] if timed and precision == INT8 else None,
                least_speedup=tolerances("precisions", precision)["speedup"],
            )
        )  # fmt: skip
    return rows


@cache
def _spot(first: int) -> tuple[Frames, Frames, list[Flow]]:
    """Windows of the sample clip from a frame on, their truth, and its flows, which take seconds."""
    lr_windows, truth = reduced_windows(first, FRAMES)
    return lr_windows, truth, flows(truth)


def _upscale(lr_windows: Frames, runners: Mapping[str, Runner]) -> Frames:
    frames = [run_chain(window[np.newaxis], runners)[spec.HR_FRAME.name][0] for window in lr_windows]
    return np.stack(frames).astype(np.uint8, copy=False)


def _mean_psnr(frames: Frames, truth: Frames) -> float:
    return float(np.mean([psnr_y(image, true) for image, true in zip(frames, truth, strict=True)]))


def _tofs(frames: Frames, true_flows: Sequence[Sequence[Flow]]) -> NDArray[np.float64]:
    """Flicker within each spot; between spots nothing moves, it cuts."""
    parts = np.split(frames, len(true_flows))
    return np.array([tof(part, true) for part, true in zip(parts, true_flows, strict=True)])


def _medians_ms(runners: Sequence[Runner], tensors: Tensors) -> list[float]:
    """Median time of each, run in turn after one warm-up."""
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(ROUNDS + 1):
        for run, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            run(tensors)
            taken.append(1000 * (time.perf_counter() - start))
    return [float(np.median(taken[1:])) for taken in times]
