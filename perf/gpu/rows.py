"""The rows as data: what runs, in which precision, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from export.network import BASELINE, PRUNED, Widths
from perf.clip import Size
from perf.gpu.plans import measure_plans
from perf.gpu.served import measure_served
from perf.peers.timing import ON_GPU, measure
from perf.process import in_process

NETWORKS: dict[str, tuple[str, Widths]] = {
    "pruned": ("MST-GAN, pruned", PRUNED),
    "baseline": ("MST-GAN", BASELINE),
}
"""Ours -> name among the peers, and widths."""
ROUNDS = 20  # of PyTorch, each of one window
LIMIT_S = 20.0  # for the rounds of one row
BATCH = 4  # of what is served


@dataclass(frozen=True)
class Row:
    """One way to run the network."""

    key: str
    name: str
    network: str
    """One of ``NETWORKS``."""
    precision: str
    """Of the ceiling that it is held against."""
    batch: int
    how: Any
    """(size, device, timeout_s) -> frames/s of the rounds, and peak memory of the GPU in MiB or None."""


def rows() -> list[Row]:
    """All rows, those that compile for minutes last."""
    fp32, tf32, fp16, compiled = ON_GPU
    return [
        *(_pytorch(runtime, network) for network in NETWORKS for runtime in (fp32, tf32, fp16)),
        Row("served-cuda", "served, target cuda", "pruned", "FP16", BATCH, partial(_served, "cuda")),
        Row(
            "served-tensorrt",
            "served, target tensorrt",
            "pruned",
            "FP16",
            BATCH,
            partial(_served, "tensorrt"),
        ),
        Row("plans-fp16", "plans FP16, in one process", "pruned", "FP16", 1, partial(_plans, "fp16")),
        Row("plans-int8", "plans INT8, in one process", "pruned", "INT8", 1, partial(_plans, "int8")),
        _pytorch(compiled, "pruned"),
    ]


def _pytorch(runtime: str, network: str) -> Row:
    precision = runtime.rpartition(" ")[2]
    key = f"{runtime} {network}".lower().replace(" ", "-")
    return Row(key, f"{runtime}, {network}", network, precision, 1, partial(_eager, runtime, network))


def _eager(
    runtime: str, network: str, size: Size, device: str, timeout_s: float
) -> tuple[list[float], float | None]:
    arguments = (NETWORKS[network][0], runtime, size, LIMIT_S, ROUNDS, 1, device)
    found = in_process(measure, *arguments, timeout_s=timeout_s)
    return [1000 / ms for ms in found["ms_per_frame"]], found["peak_memory_mb"]


def _served(target: str, size: Size, device: str, timeout_s: float) -> tuple[list[float], float | None]:
    return measure_served(target, size, BATCH, timeout_s)


def _plans(rung: str, size: Size, device: str, timeout_s: float) -> tuple[list[float], float | None]:
    result: tuple[list[float], float | None] = in_process(measure_plans, rung, size, timeout_s=timeout_s)
    return result
