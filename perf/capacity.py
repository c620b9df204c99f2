"""What a library of films takes: machines, hours, bytes, and the first bottleneck, by the measured figures.

``python -m perf.capacity --films 10000 --minutes 90 --size 640x360 --target student``
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from perf import results
from perf.results import Figure, PerfError, Result, figure

WINDOW, SCALE, CHANNELS = 3, 4, 3  # of the served ensemble
MOST_MACHINES = 100_000
LEASE_S = 60  # after which another machine takes the film of a dead one over
SEGMENT_FRAMES = 100  # work that a dead machine loses at most
HOUR_S, DAY_S = 3600, 86_400


@dataclass(frozen=True)
class Rates:
    """Frames per second of one machine, at one size; the least and the most follow the rounds."""

    served: Figure
    """Measured: the target, by perf_analyzer, at the size of the sweeps."""
    of_size: float
    """Measured for the default target: rate at the wanted size over that at the size of the sweeps."""
    client_s: float
    """Measured for the default target: seconds a frame that decoding, transfer and encoding add."""
    pixels: float
    """Of the wanted size over the size of the sweeps."""

    def film_to_film(self, served: float) -> float:
        """Estimate: frames per second from file to file, server and client on one machine."""
        return 1 / (1 / (served * self.of_size) + self.client_s * self.pixels)


def rates(found: Mapping[str, Result], target: str, size: tuple[int, int]) -> Rates:
    """Read them from results. PerfError: something was not measured.

    Args:
        found: What ``results.load_folder`` gave.
        target: Weights of the ladder, such as ``student``.
        size: (height, width).
    """
    if missing := {"ladder", "sizes", "end_to_end"} - set(found):
        raise PerfError(f"expected results of {', '.join(sorted(missing))}, found none: run `make measure`")
    served_rows = [row for row in found["ladder"]["rows"] if row["rounds"] and "eager" not in row["key"]]
    steps = {row["weights"]: row for row in served_rows}  # of several precisions, the last: the fastest
    results.known([target], steps, "targets that were measured")
    base = tuple(found["ladder"]["size"])
    sizes = [(math.prod(row["size"]), _fps(row)) for row in found["sizes"]["rows"]]
    by_pixels = sorted((math.log(count), fps * count) for count, fps in sizes)
    if math.prod(base) < math.exp(by_pixels[0][0]) * 0.99:
        raise PerfError("expected the ladder's size among the sizes of the sweep `sizes`: measure it again")
    logs, pixel_rates = zip(*by_pixels, strict=True)
    wanted, known = (float(np.interp(math.log(math.prod(one)), logs, pixel_rates)) for one in (size, base))
    pixels = math.prod(size) / math.prod(base)
    rows = {row["name"]: _fps(row) for row in found["end_to_end"]["rows"]}
    served = figure(steps[target], "fps")
    assert served
    client_s = 1 / rows["file to file"] - 1 / rows["perf_analyzer"]
    return Rates(served, wanted / known / pixels, client_s, pixels)


def _fps(row: Mapping[str, Any]) -> float:
    one = figure(row, "fps")
    assert one
    return float(one.median)


@dataclass(frozen=True)
class Outcome:
    """How a simulated farm did."""

    hours: float
    busy: float
    """Share of the time that machines worked."""
    failures: int


def simulate(
    films: int, film_s: float, machines: int, mtbf_s: float, lost_s: float, seed: int = 0
) -> Outcome:
    """Every machine takes the next film when it is done; failures at random cost ``lost_s`` each.

    Args:
        films: All of one length, there from the start.
        film_s: Seconds that one film takes one machine.
        machines: At least 1.
        mtbf_s: Mean seconds of work between two failures of a machine.
        lost_s: Until another machine goes on, and what is done again.
        seed: Of the failures.
    """
    failures = np.random.default_rng(seed).poisson(film_s / mtbf_s, films)
    free_s = [0.0] * machines
    for failed in failures:
        heapq.heapreplace(free_s, free_s[0] + film_s + float(failed) * lost_s)
    end_s, total = max(free_s), int(failures.sum())
    return Outcome(end_s / HOUR_S, films * film_s / (machines * end_s), total)


@dataclass(frozen=True)
class Library:
    """What is to be done."""

    films: int
    minutes: float
    fps: float
    size: tuple[int, int]
    """(height, width)."""
    lr_mbit: float
    hr_mbit: float
    """Megabits per second of a film, before and after."""

    frames_per_film = property(lambda self: self.minutes * 60 * self.fps)
    stored_bytes = property(lambda self: self.minutes * 60 * (self.lr_mbit + self.hr_mbit) * 1e6 / 8)
    """Of one film, read and written."""
    frame_bytes = property(lambda self: math.prod(self.size) * CHANNELS * (WINDOW + SCALE**2))
    """Between client and server, uncompressed."""


def plan(
    library: Library, one: Rates, machine: str, days: float, storage_gbit: float, mtbf_days: float
) -> list[str]:
    """The plan as lines. PerfError: there is none."""
    deadline_s, storage = days * DAY_S, storage_gbit * 1e9 / 8
    total_bytes = library.films * library.stored_bytes
    if total_bytes / storage > deadline_s:
        raise PerfError(
            f"expected to read and write {total_bytes / 1e12:.0f} TB in {days:g} days, found that "
            f"{storage_gbit:g} Gbit/s take {total_bytes / storage / DAY_S:.1f}: more days, or --storage-gbit"
        )

    def run(machines: int, served: float) -> Outcome:
        fps = one.film_to_film(served)
        film_s = max(library.frames_per_film / fps, library.stored_bytes * machines / storage)
        return simulate(library.films, film_s, machines, mtbf_days * DAY_S, LEASE_S + SEGMENT_FRAMES / fps)

    fps = one.film_to_film(one.served.median)
    machines = max(1, math.floor(library.films * library.frames_per_film / fps / deadline_s))
    while (middle := run(machines, one.served.median)).hours * HOUR_S > deadline_s:
        machines += max(1, machines // 1000)
        if machines > min(MOST_MACHINES, library.films):
            raise PerfError(
                f"expected to end in {days:g} days, found that one film takes a machine "
                f"{library.frames_per_film / fps / DAY_S:.1f} days, or too many machines: more --days"
            )
    slow, quick = (run(machines, served).hours for served in (one.served.low, one.served.high))
    low, high = (one.film_to_film(served) for served in (one.served.low, one.served.high))
    film_bytes_per_s = fps * library.stored_bytes / library.frames_per_film  # of one machine
    storage_load = machines * film_bytes_per_s / storage
    shares = {
        "processors": middle.busy / max(1.0, storage_load),
        f"storage of {storage_gbit:g} Gbit/s": min(1.0, storage_load),
    }
    first = max(shares, key=lambda name: shares[name])
    height, width = library.size
    frames = library.films * library.frames_per_film
    return [
        f"library   {library.films} films of {library.minutes:g} min, {library.fps:g} frames/s, "
        f"{width}x{height} to {width * SCALE}x{height * SCALE}: {frames:.3g} frames",
        f"measured  {one.served.text()} frames/s served, {machine}",
        f"estimate  {fps:.2f} ({low:.2f}-{high:.2f}) frames/s from file to file at {width}x{height}, "
        "client and server on one machine",
        f"plan      {machines} such machines: {middle.hours:.0f} h ({quick:.0f}-{slow:.0f} h), "
        f"{machines * middle.hours:.3g} machine hours, {middle.failures} failures of machines on the way",
        f"bytes     {total_bytes / 1e12:.1f} TB read and written (assumed bit rates); "
        f"{frames * library.frame_bytes / 1e15:.2f} PB between client and server, "
        f"{fps * library.frame_bytes * 8 / 1e9:.2f} Gbit/s within each machine",
        *(f"load      {name}: {share:.0%}" for name, share in shares.items()),
        f"first bottleneck: {first}; the storage is one from {storage / film_bytes_per_s:.0f} machines on",
    ]


def parse_size(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Read ``640x360`` as (height, width)."""
    found = re.fullmatch(r"([1-9]\d{1,4})x([1-9]\d{1,4})", value)
    if not found:
        raise click.BadParameter(f"expected WIDTHxHEIGHT such as 640x360, found {value!r}")
    return int(found[2]), int(found[1])


POSITIVE = click.FloatRange(0, min_open=True)


@click.command(cls=results.Command, context_settings={"show_default": True})
@click.option("--films", type=click.IntRange(1), default=10_000)
@click.option("--minutes", type=POSITIVE, default=90.0, help="Of each film.")
@click.option("--fps", type=POSITIVE, default=25.0, help="Frames per second of each film.")
@click.option("--size", default="640x360", callback=parse_size, help="Of the films, WIDTHxHEIGHT.")
@click.option("--target", default="student", help="Weights, as perf/results/ladder.json has them.")
@click.option("--days", type=POSITIVE, default=30.0, help="In which all must be done.")
@click.option("--lr-mbit", type=POSITIVE, default=1.5, help="Assumed bit rate of films, Mbit/s.")
@click.option("--hr-mbit", type=POSITIVE, default=15.0, help="Assumed bit rate of upscaled films, Mbit/s.")
@click.option("--storage-gbit", type=POSITIVE, default=10.0, help="Assumed link to the storage, Gbit/s.")
@click.option("--mtbf-days", type=POSITIVE, default=30.0, help="Assumed days between failures of a machine.")
@click.option("--results", "folder", type=click.Path(path_type=Path), default=results.FOLDER)
def main(
    films: int, minutes: float, fps: float, size: tuple[int, int], target: str, days: float, lr_mbit: float,
    hr_mbit: float, storage_gbit: float, mtbf_days: float, folder: Path,
) -> None:  # fmt: skip
    """Print what a library takes; the same options give the same plan."""
    found = results.load_folder(folder)
    one = rates(found, target, size)
    machine = found["ladder"]["machine"]
    measured_height, measured_width = found["ladder"]["size"]
    where = (
        f"{measured_width}x{measured_height}, {machine['cpu']}, {machine['cores']} cores, {machine['date']}"
    )
    library = Library(films, minutes, fps, size, lr_mbit, hr_mbit)
    for line in plan(library, one, where, days, storage_gbit, mtbf_days):
        click.echo(line)


if __name__ == "__main__":
    main()
