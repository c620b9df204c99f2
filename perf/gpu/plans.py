"""Plans of TensorRT or TensorRT-RTX, called one after the other in one process; tensors stay on the GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from export import spec
from export.errors import ExportError
from export.plan import LIBRARIES, load_library, point_polygraphy_at
from perf import clip
from perf.clip import Size
from perf.errors import PerfError
from perf.machine import ROOT

FOLDER = ROOT / "build" / "plans"  # where `make plans` puts them, a folder for each library
ROUNDS = 20


class Runner(Protocol):
    """Polygraphy's, as far as it is used."""

    def infer(self, feed_dict: Mapping[str, Any], copy_outputs_to_host: bool) -> Mapping[str, Any]:
        """Answers of one plan."""


def measure_plans(rung: str, size: Size, folder: Path = FOLDER) -> tuple[list[float], float | None]:
    """Frames/s of single windows through the three plans, and the most memory that they took of the GPU.

    Raises:
        PerfError: There is no library, or no plan.
    """
    library = find_library(folder, rung)
    point_polygraphy_at(library, load_library(library))
    from polygraphy.backend import trt as backend

    torch.cuda.init()
    free_before, _ = torch.cuda.mem_get_info()
    window = torch.from_numpy(clip.windows(clip.read_frames(spec.WINDOW, size), spec.WINDOW)[1:2]).cuda()
    with ExitStack() as stack:
        engines = [backend.EngineFromBytes(path.read_bytes()) for path in plan_paths(folder / library, rung)]
        runners = [stack.enter_context(backend.TrtRunner(engine)) for engine in engines]
        fps = time_chain(runners, window, ROUNDS)
        free_after, _ = torch.cuda.mem_get_info()
    return fps, (free_before - free_after) / 2**20


def find_library(folder: Path, rung: str) -> str:
    """A library that is installed and that there are plans of.

    Raises:
        PerfError: There is none.
    """
    reasons = []
    for library in LIBRARIES:
        missing = [path.name for path in plan_paths(folder / library, rung) if not path.is_file()]
        if missing:
            reasons.append(
                f"no {missing[0]} in {folder / library} (`python -m export plans --library {library}`)"
            )
            continue
        try:
            load_library(library)
        except ExportError as err:
            reasons.append(str(err))
            continue
        return library
    raise PerfError("; ".join(reasons))


def plan_paths(folder: Path, rung: str) -> list[Path]:
    """Plans of the stages in their order, the generator's in this precision."""
    names = [f"{stage.name}.{rung}" if stage == spec.GENERATOR else stage.name for stage in spec.STAGES]
    return [folder / f"{name}.plan" for name in names]


def time_chain(runners: Sequence[Runner], window: torch.Tensor, rounds: int) -> list[float]:
    """Frames/s of every round after the first; each waits until its frame is there."""
    fps = []
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        tensors: dict[str, Any] = {spec.LR_WINDOW.name: window}
        for stage, runner in zip(spec.STAGES, runners, strict=True):
            feeds = {tensor.name: tensors[tensor.name] for tensor in stage.inputs}
            answers = runner.infer(feeds, copy_outputs_to_host=False)
            tensors |= dict(answers)
        if window.is_cuda:
            torch.cuda.synchronize()
        fps.append(len(window) / (time.perf_counter() - started_s))
    return fps[1:]
