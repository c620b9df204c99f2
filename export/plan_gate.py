"""Plans in, what they answer and how fast on the GPU at hand out: a plan that errs is not installed.

A plan computes what its graph says, but with kernels of the builder's choosing, and some versions choose
wrong ones (NVIDIA/TensorRT#4646: GridSample). So all plans answer on real frames before anyone is served.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export import spec
from export.data.sample import sample_windows
from export.errors import ExportError
from export.gates import limits_of
from export.model_config import FP16, INT8
from export.parity import REPORT, TOLERANCES
from export.plan import load_library, point_polygraphy_at

log = logging.getLogger(__name__)

SIZE: spec.Size = (180, 320)  # lr
ROUNDS = 20  # timed, after one that warms up

Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class PlanVerdict:
    """The chain of plans with a generator of one precision, against the same graphs in ONNX Runtime."""

    rung: str
    psnr_db: float
    """Of the frames, 0..255; infinite where they are equal."""
    least_psnr_db: float
    ms: float
    """Median of the generator alone at 320x180, copies from and to the host included."""


def judge_plans(library: str, graphs: Mapping[str, Path], plans: Mapping[str, Path]) -> list[PlanVerdict]:
    """Run the chain with every precision of the generator.

    Args:
        library: that built the plans.
        graphs: name as in ``rungs.PLANS`` -> ONNX file.
        plans: the same names -> plan.
    """
    least = tomllib.loads(TOLERANCES.read_text())["plans"]["psnr_db"]
    window: Tensors = {spec.LR_WINDOW.name: sample_windows(1, SIZE)}
    verdicts = []
    for rung in (FP16, INT8):
        answered, expected = dict(window), dict(window)
        ms = 0.0
        for stage in spec.STAGES:
            name = f"{stage.name}.{rung}" if stage == spec.GENERATOR else stage.name
            answers, taken = run_plan(library, plans[name], _inputs(stage, answered))
            answered |= answers
            expected |= _run_graph(graphs[name], _inputs(stage, expected))
            ms = taken if stage == spec.GENERATOR else ms
        error = answered[spec.HR_FRAME.name].astype(float) - expected[spec.HR_FRAME.name].astype(float)
        mse = float(np.mean(error**2))
        psnr_db = 10 * np.log10(255**2 / mse) if mse else np.inf
        verdicts.append(PlanVerdict(rung, float(psnr_db), least, ms))
    return verdicts


def choose(verdicts: list[PlanVerdict], folder: Path, *, judge_speed: bool) -> str:
    """Log the verdicts, add them to ``parity.json`` in ``folder``, and name the generator to serve.

    INT8 is served if it answers right and is as fast as FP16, by the committed tolerances.

    Raises:
        ExportError: a chain does not answer as its graphs do.
    """
    path = folder / REPORT
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["plans"] = [asdict(verdict) for verdict in verdicts]
    path.write_text(json.dumps(report, indent=2) + "\n")
    for verdict in verdicts:
        log.info("plans, %s: %.1f dB from their graphs, %.2f ms", verdict.rung, verdict.psnr_db, verdict.ms)
    # Written so that a PSNR that is not a number fails.
    wrong = [v for v in verdicts if not v.psnr_db >= v.least_psnr_db]
    if wrong:
        raise ExportError(
            "plans do not answer as their graphs do: "
            + "; ".join(f"{v.rung} {v.psnr_db:.1f} dB (at least {v.least_psnr_db:g})" for v in wrong)
            + f". Nothing was installed; see {path}, and try another TensorRT version"
        )
    ms = {verdict.rung: verdict.ms for verdict in verdicts}
    if judge_speed and ms[FP16] / ms[INT8] < limits_of(INT8).speedup:
        log.warning(
            "generator in int8 is not promoted: %.2f ms here, in fp16 %.2f ms, which is served instead",
            ms[INT8], ms[FP16],
        )  # fmt: skip
        return FP16
    return INT8


def run_plan(library: str, plan: Path, inputs: Tensors) -> tuple[Tensors, float]:
    """Answers of a plan on the GPU, and the median of its time in ms."""
    point_polygraphy_at(library, load_library(library))
    from polygraphy.backend import trt as backend

    with backend.TrtRunner(backend.EngineFromBytes(plan.read_bytes())) as runner:
        times = []
        for _ in range(ROUNDS + 1):
            answers = {name: np.array(value) for name, value in runner.infer(inputs).items()}
            times.append(1000 * runner.last_inference_time())
    return answers, float(np.median(times[1:]))


def _run_graph(graph: Path, inputs: Tensors) -> Tensors:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _inputs(stage: spec.ModelSpec, tensors: Tensors) -> Tensors:
    return {tensor.name: tensors[tensor.name] for tensor in stage.inputs}
