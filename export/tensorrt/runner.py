"""Run plans on the GPU at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.tensorrt.plan import load_library, point_polygraphy_at

ROUNDS = 20  # timed, after one that warms up

Tensors = dict[str, NDArray[Any]]


def run_plan(library: str, plan: Path, inputs: Tensors) -> tuple[Tensors, float]:
    """Answers of a plan, and the median of its time in ms, copies from and to the host included."""
    point_polygraphy_at(library, load_library(library))
    from polygraphy.backend import trt as backend

    with backend.TrtRunner(backend.EngineFromBytes(plan.read_bytes())) as runner:
        times = []
        for _ in range(ROUNDS + 1):
            # A runner may hand out the same buffers again at its next call.
            answers = {name: np.array(value) for name, value in runner.infer(inputs).items()}
            times.append(1000 * runner.last_inference_time())
    return answers, float(np.median(times[1:]))
