"""Measured points as the report needs them: medians with their spread, and what tells points apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from perf.results import Result

SETTINGS = (
    "target",
    "form",
    "queue_delay_us",
    "instances",
    "size",
    "batch",
    "concurrency",
    "transport",
    "load",
)
PRECISIONS = {"cpu": "INT8", "fp32": "FP32", "cuda": "FP16", "tensorrt": "plans"}  # of targets
AS_COMMITTED = "as committed"
GENERATOR = "generator"
FUSED = "fused"
QUIET_CORES = 0.15  # what a system does by itself


def mark(others_cores: float) -> str:
    """What stands before a figure that other programs disturbed."""
    return "!" * (others_cores > QUIET_CORES)


def disturbed_note(others_cores: Sequence[float], what: str) -> list[str]:
    """What the mark means, where it is needed."""
    disturbed = sum(cores > QUIET_CORES for cores in others_cores)
    if not disturbed:
        return []
    return [
        f"`!`: other programs used more than {QUIET_CORES:g} cores meanwhile, "
        f"at {disturbed} of {len(others_cores)} {what}."
    ]


@dataclass(frozen=True)
class Figure:
    """A measured quantity over the rounds of a point."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to show."""
        return median(self.values)

    @property
    def span(self) -> tuple[float, float]:
        """Least and most."""
        return min(self.values), max(self.values)

    def text(self, digits: int = 1) -> str:
        """Median, and the span where there were several rounds."""
        shown, low, high = (f"{value:.{digits}f}" for value in (self.median, *self.span))
        return shown if low == high else f"{shown} ({low}-{high})"


@dataclass(frozen=True)
class Measured:
    """One point of a sweep, all rounds together."""

    settings: dict[str, Any]
    rate: float | None
    """Requests per second offered; None: closed loop."""
    is_stable: bool
    """In every round."""
    fps: Figure
    latency_ms: dict[str, Figure]
    batch: Figure | None
    """Frames per run of the slowest stage, as the server counted them."""
    memory_mb: Figure | None
    """Of the server's processes; None: it was not ours to see."""
    gpu_memory_mb: Figure | None
    """In use on the GPU; None: there was none."""
    others_cores: float
    """Processor cores that other programs used meanwhile; the most of the rounds."""
    stages: dict[str, dict[str, float]]
    """Of the last round."""

    @property
    def offered_fps(self) -> float:
        """Frames per second that an open loop offers."""
        assert self.rate is not None
        return self.rate * int(self.settings["batch"])

    def label(self, keys: list[str]) -> str:
        """These settings in words."""
        return ", ".join(described(key, self.settings[key]) for key in keys)


def measured(result: Result) -> list[Measured]:
    """The points of a sweep that were measured at least once."""
    return [_measured(point) for point in result["points"] if point["rounds"]]


def varying(points: list[Measured]) -> list[str]:
    """The settings in which points differ."""
    return [key for key in SETTINGS if len({str(point.settings.get(key)) for point in points}) > 1]


def grouped(points: Sequence[Measured], keys: list[str]) -> dict[str, list[Measured]]:
    """The points by these settings in words, in the order in which they first come up."""
    groups: dict[str, list[Measured]] = {}
    for point in points:
        groups.setdefault(point.label(keys), []).append(point)
    return groups


def size_name(size: Sequence[int]) -> str:
    """(height, width) as everybody writes it."""
    return f"{size[1]}x{size[0]}"


def described(key: str, value: Any) -> str:
    """A setting as a reader would say it."""
    if value is None:
        return (
            "closed loop" if key == "load" else f"{key.removesuffix('_us').replace('_', ' ')} {AS_COMMITTED}"
        )
    match key:
        case "size":
            return size_name(value)
        case "queue_delay_us":
            return f"delay {value / 1000:g} ms"
        case "instances":
            return f"{value} instance group{'s' * (value > 1)}"
        case "concurrency":
            return f"{value} in flight"
        case "load":
            return f"{value:.0%} of saturation"
        case "transport":
            return {"grpc": "gRPC", "system": "shared memory", "cuda": "CUDA shared memory"}[value]
        case "target":
            return f"{PRECISIONS[value]} ({value})" if value in PRECISIONS else str(value)
        case "form":
            return str(value)
    return f"{key} {value}"


def _measured(point: dict[str, Any]) -> Measured:
    rounds = point["rounds"]
    percentiles = rounds[0]["latency_ms"]
    slowest = [
        stages[name]["batch"]
        for one in rounds
        for name in (GENERATOR, FUSED)
        if name in (stages := one["stages"])
    ]
    return Measured(
        settings={key: point.get(key) for key in SETTINGS},
        rate=point["rate"],
        is_stable=all(one["stable"] for one in rounds),
        fps=Figure(tuple(one["fps"] for one in rounds)),
        latency_ms={name: Figure(tuple(one["latency_ms"][name] for one in rounds)) for name in percentiles},
        batch=_figure(slowest),
        memory_mb=_figure([one["server_memory_mb"] for one in rounds]),
        gpu_memory_mb=_figure([one.get("gpu_memory_mb") for one in rounds]),
        others_cores=max(one["others_cores"] or 0.0 for one in rounds),
        stages=rounds[-1]["stages"],
    )


def _figure(values: list[float | None]) -> Figure | None:
    """A figure of the rounds that have it."""
    known = tuple(value for value in values if value is not None)
    return Figure(known) if known else None
