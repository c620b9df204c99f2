"""Sweeps as data: ``sweeps.toml`` in, points to measure out."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from perf.clip import Size
from perf.errors import PerfError
from perf.variant import Serving

SWEEPS = Path(__file__).with_name("sweeps.toml")
TRANSPORTS = {"grpc": "none", "system": "system", "cuda": "cuda"}  # perf_analyzer's --shared-memory
GPU_TARGETS = {"cuda", "tensorrt"}
FORMS = ("ensemble", "fused")


@dataclass(frozen=True)
class Sweep:
    """One table of ``sweeps.toml``; every combination of its lists is one point."""

    name: str
    question: str
    """What the sweep answers; the heading of its part of the report."""
    sizes: tuple[Size, ...] = ((180, 320),)
    """(height, width) of the lr frame."""
    batches: tuple[int, ...] = (1,)
    """Windows per request."""
    concurrencies: tuple[int, ...] = (4,)
    """Requests in flight."""
    loads: tuple[float, ...] = ()
    """Open loop instead: Poisson arrivals at these shares of the throughput that ``concurrencies`` reach."""
    queue_delays_us: tuple[int, ...] = ()
    """Of every stage's batcher; empty: as committed."""
    instances: tuple[int, ...] = ()
    """Instance groups of every stage; empty: as committed."""
    transports: tuple[str, ...] = ("grpc",)
    forms: tuple[str, ...] = ("ensemble",)
    targets: tuple[str, ...] = ()
    """Configurations to serve, ``<model>/configs/<target>.pbtxt``; empty: ``config.pbtxt``."""
    frames: int = 24
    """Frames of one of perf_analyzer's windows, at least; a measurement is three of them."""
    rounds: int = 1
    """Everything is measured so often, in turns, so that the machine's own noise shows."""
    stability_percent: int = 10
    """A round whose windows lie further from their mean is marked."""
    percentile: int = 95
    timeout_s: int = 240
    """Of one run of perf_analyzer."""


@dataclass(frozen=True)
class Point:
    """One place of a sweep."""

    serving: Serving
    size: Size
    batch: int
    concurrency: int
    transport: str
    load: float | None = None
    """Share of the closed loop's throughput; None: closed loop."""

    def as_dict(self) -> dict[str, Any]:
        """For results files and labels."""
        return {
            "target": self.serving.target,
            "form": self.serving.form,
            "queue_delay_us": self.serving.queue_delay_us,
            "instances": self.serving.instances,
            "size": list(self.size),
            "batch": self.batch,
            "concurrency": self.concurrency,
            "transport": self.transport,
            "load": self.load,
        }


def points(sweep: Sweep) -> Iterator[Point]:
    """All points of a sweep; those of one server setting in a row, and closed loops before open ones."""
    for target, delay, instances, form in itertools.product(
        sweep.targets or (None,), sweep.queue_delays_us or (None,), sweep.instances or (None,), sweep.forms
    ):
        serving = Serving(target, delay, instances, form)
        for size, batch, transport in itertools.product(sweep.sizes, sweep.batches, sweep.transports):
            for concurrency in sweep.concurrencies:
                closed = Point(serving, size, batch, concurrency, transport)
                yield closed
                yield from (replace(closed, load=load) for load in sweep.loads)


def needs_gpu(sweep: Sweep) -> bool:
    """Whether a machine without a GPU has to leave this sweep out."""
    return bool(GPU_TARGETS & set(sweep.targets)) or "cuda" in sweep.transports


def changes_server(sweep: Sweep) -> bool:
    """Whether its points need servers of different settings."""
    return len({point.serving for point in points(sweep)}) > 1 or bool(
        sweep.instances or sweep.queue_delays_us
    )


def load_sweep(name: str, path: Path = SWEEPS) -> Sweep:
    """One sweep of the file.

    Raises:
        PerfError: The file has no such sweep, or its table is not right.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as err:
        raise PerfError(f"expected sweeps in {path}, found: {err}; correct it") from err
    if name not in tables:
        raise PerfError(f"expected a sweep of {path.name}: {', '.join(tables)}; found {name!r}")
    return _sweep(name, tables[name], path)


def sweep_names(path: Path = SWEEPS) -> list[str]:
    """All sweeps, in the order of the file."""
    return list(tomllib.loads(path.read_text()))


def _sweep(name: str, table: dict[str, Any], path: Path) -> Sweep:
    known = {field.name: str(field.type) for field in fields(Sweep) if field.name != "name"}
    where = f"sweep {name} of {path.name}"
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise PerfError(f"expected {where} to use {', '.join(known)}; found {key!r}")
        values[key] = _value(value, known[key], f"{key} of {where}")
    if "question" not in values:
        raise PerfError(f"expected a question in {where}, found none: say what it answers")
    sweep = Sweep(name, **values)
    for key, allowed in (("transports", tuple(TRANSPORTS)), ("forms", FORMS)):
        if unknown := set(getattr(sweep, key)) - set(allowed):
            raise PerfError(
                f"expected {key} of {where} to be among {', '.join(allowed)}; found {unknown.pop()!r}"
            )
    if any(len(size) != 2 for size in sweep.sizes):
        raise PerfError(f"expected sizes of {where} as [height, width]; found {table['sizes']}")
    if len(sweep.concurrencies) > 1 and sweep.loads:
        raise PerfError(f"expected one concurrency beside loads in {where}; found {table['concurrencies']}")
    return sweep


def _value(value: Any, kind: str, where: str) -> Any:
    """A TOML value as the type of its field."""
    match kind, value:
        case "tuple[Size, ...]", [*sizes] if all(_numbers(size, int) for size in sizes) and sizes:
            return tuple(tuple(size) for size in sizes)
        case "tuple[int, ...]", [*numbers] if _numbers(numbers, int):
            return tuple(numbers)
        case "tuple[float, ...]", [*numbers] if _numbers(numbers, int | float):
            return tuple(map(float, numbers))
        case "tuple[str, ...]", [*words] if words and all(isinstance(word, str) for word in words):
            return tuple(words)
        case "int", int() if value > 0 and not isinstance(value, bool):
            return value
        case "str", str():
            return value
    raise PerfError(f"expected {where} to be {kind}, above zero; found {value!r}")


def _numbers(values: Any, kind: Any) -> bool:
    """Whether this is a list of numbers; a queue delay may be 0."""
    return isinstance(values, list) and bool(values) and all(isinstance(v, kind) and v >= 0 for v in values)
