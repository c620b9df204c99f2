"""``make peers``: ours and theirs in one run, same frames, same threads, each in a process of its own."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from perf import results
from perf.clip import Size
from perf.counters import NO_SESSION, NoiseWatch
from perf.errors import Command, PerfError
from perf.machine import machine
from perf.peers.rows import ROWS, count
from perf.peers.timing import EAGER, ON_GPU, ONNX, measure
from perf.process import in_process

OURS = ("MST-GAN", "MST-GAN, pruned", "MST-GAN, compact", "MST-GAN, student")
PAPERS_SIZE: Size = (720, 1280)  # of the papers' FLOPs

log = logging.getLogger(__name__)


def runtimes(name: str, has_gpu: bool) -> tuple[str, ...]:
    """What a network is measured in; rivals are not compiled, which takes minutes each."""
    if not has_gpu:
        return EAGER, ONNX
    return ON_GPU if name in OURS else ON_GPU[:-1]


@click.command(cls=Command)
@click.argument("names", nargs=-1)
@click.option("--size", nargs=2, default=(180, 320), help="Lr height and width.")
@click.option("--limit", default=10.0, help="Seconds for one network; what is slower gets a smaller frame.")
@click.option("--rounds", default=3, help="Runs of each network; the median counts.")
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
def main(names: tuple[str, ...], size: Size, limit: float, rounds: int, out: Path) -> None:
    """Measure the networks NAMES, or all."""
    if unknown := set(names) - set(ROWS):
        raise PerfError(f"expected networks among {', '.join(ROWS)}; found {unknown.pop()!r}")
    started_s, threads = time.monotonic(), len(os.sched_getaffinity(0))
    failed: list[str] = []
    path: Path | None = None
    has_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "kind": "peers",
        "name": "peers_gpu" if has_gpu else "peers",
        "machine": machine(),
        "threads": threads,
        "size": list(size),
        "papers_size": list(PAPERS_SIZE),
        "networks": {},
        "rows": [],
    }
    for name in names or ROWS:
        costs = {side: count(ROWS[name], side) for side in (size, PAPERS_SIZE)}
        result["networks"][name] = {
            "parameters": costs[size].parameters,
            "flops": costs[size].flops,
            "flops_at_papers_size": costs[PAPERS_SIZE].flops,
        }
        for runtime in runtimes(name, has_gpu):
            watch = NoiseWatch(NO_SESSION)
            try:
                row = in_process(measure, name, runtime, size, limit, rounds, threads)
            except PerfError as err:
                failed.append(f"{name} in {runtime}: {err}")
                log.info("%s", failed[-1])
                continue
            result["rows"].append({**row, "others_cores": watch.others_cores()})
            path = results.write(out, result)
            log.info(
                "%-16s %-18s %9.1f ms/frame  %dx%d  %.1f min gone", name, runtime,
                median(row["ms_per_frame"]), row["size"][1], row["size"][0],
                (time.monotonic() - started_s) / 60,
            )  # fmt: skip
    log.info("%s", path)
    if failed:
        raise PerfError(f"{len(failed)} rows are missing: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
