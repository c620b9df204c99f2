"""A device's ceilings, the roofline under them, and TensorRT plans one after the other in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export import spec
from export.tensorrt.plan import LIBRARIES
from export.tensorrt.runner import Tensors, run_plan
from perf.clips import Size, read_frames, windows
from perf.machine import ROOT
from perf.network import Layer
from perf.results import PerfError, Row, one_line

PLANS = ROOT / "build" / "plans"  # where `make plans` puts them, a folder for each library
BYTES = {"FP32": 4, "TF32": 4, "FP16": 2, "INT8": 1}
"""Ceiling of arithmetic -> bytes of an element that goes with it."""
COPY = "copy"
INT8_MULTIPLE = 16  # of the sides of a product on INT8 tensor cores

log = logging.getLogger(__name__)


def least_seconds(layers: Sequence[Layer], precision: str, ceilings: Mapping[str, float]) -> float:
    """The roofline: the least time for these layers, one after the other, and nothing between them."""
    arithmetic, copy = ceilings[precision], ceilings[COPY]
    return sum(max(one.flops / arithmetic, one.elements * BYTES[precision] / copy) for one in layers)


def measure_ceilings(device: str, side: int, copy_bytes: int, repeats: int = 10) -> dict[str, float]:
    """The best that a large square product and a large copy reach on a device.

    Returns:
        FLOP/s (2 x MAC) for every precision that the device has, and bytes/s, read and written, of ``COPY``.
    """
    found = {}
    for precision in BYTES if device != "cpu" else ("FP32",):
        try:
            found[precision] = 2 * side**3 / _best_seconds(_product(precision, device, side), device, repeats)
        except RuntimeError as err:
            # Rows of this precision have no roofline then; all others have theirs.
            log.warning("no ceiling for %s: %s", precision, one_line(err))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found[COPY] = 2 * copy_bytes / _best_seconds(lambda: target.copy_(source), device, repeats)
    return found


def int8_operands(side: int, device: str) -> tuple[Tensor, Tensor]:
    """Two (side, side) int8 matrices, row-major and column-major, as cuBLASLt's INT8 kernels take them.

    Its tensor-core kernels know the TN format alone (cuBLAS documentation, ``cublasLtMatmul``), best on sides
    of 16n: with both row-major, ``torch._int_mm`` reached a sixth of FP16's rate on an H200.
    """
    assert side % INT8_MULTIPLE == 0
    left, right = (torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return left, right.t()


def _product(precision: str, device: str, side: int) -> Callable[[], Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    if precision == "INT8":
        left, right = int8_operands(side, device)
        return lambda: torch._int_mm(left, right)
    dtype = torch.float16 if precision == "FP16" else torch.float32
    factor = torch.randn((side, side), dtype=dtype, device=device)
    return lambda: factor @ factor


def _best_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of the runs after the first, which chooses kernels."""
    seconds = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])


def measure_plans(precision: str, size: Size, rounds: int, folder: Path = PLANS) -> Row:
    """Frames/s of single windows through the three plans, copies from and to the host included."""
    names = [f"{stage.name}.{precision}" if stage == spec.GENERATOR else stage.name for stage in spec.STAGES]
    files = {library: [folder / library / f"{name}.plan" for name in names] for library in LIBRARIES}
    library = next((one for one, paths in files.items() if all(path.is_file() for path in paths)), None)
    if library is None:
        raise PerfError(
            f"no plans of all stages, the generator's in {precision}, in {folder}: run `make plans`"
        )
    fps = []
    for _ in range(rounds):
        tensors: Tensors = {spec.LR_WINDOW.name: windows(read_frames(spec.WINDOW, size), spec.WINDOW)[1:2]}
        total_ms = 0.0
        for stage, path in zip(spec.STAGES, files[library], strict=True):
            answers, ms = run_plan(library, path, {one.name: tensors[one.name] for one in stage.inputs})
            tensors, total_ms = tensors | answers, total_ms + ms
        fps.append({"fps": round(1000 / total_ms, 2)})
    return {"size": list(size), "rounds": fps}
