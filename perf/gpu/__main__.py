"""``make gpu``: our network on the GPU at hand, in PyTorch and served, beside the GPU's own ceilings."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from perf import results
from perf.clip import Size
from perf.errors import Command, PerfError, one_line
from perf.gpu.roofline import PRECISIONS, least_seconds, measure_ceilings, our_layers
from perf.gpu.rows import NETWORKS, Row, rows
from perf.machine import ROOT, machine
from perf.process import in_process

SIZES: tuple[Size, ...] = ((180, 320), (720, 1280))
LEAST_S = 5.0  # a row is not begun with less time than this

Measured = dict[str, Any]
log = logging.getLogger(__name__)


def measured_row(row: Row, size: Size, device: str, ceilings: dict[str, float], left_s: float) -> Measured:
    """Figures of a row at a size; where there are none, ``why`` says why."""
    found: Measured = {
        "key": row.key, "name": row.name, "network": row.network, "precision": row.precision,
        "size": list(size), "batch": row.batch, "bound_fps": None, "fps_rounds": [],
        "peak_gpu_memory_mb": None,
    }  # fmt: skip
    if row.precision in ceilings:
        layers = our_layers(NETWORKS[row.network][1], size, row.batch)
        found["flops_per_frame"] = sum(layer.flops for layer in layers) / row.batch
        elements = sum(layer.elements for layer in layers) / row.batch
        found["bytes_per_frame"] = elements * PRECISIONS[row.precision]
        found["bound_fps"] = round(row.batch / least_seconds(layers, row.precision, ceilings), 2)
    if left_s < LEAST_S:
        return {**found, "why": "the time of this run was over"}
    try:
        fps, peak_mb = row.how(size, device, left_s)
    except PerfError as err:
        return {**found, "why": one_line(err).replace(f"{ROOT}/", "")}
    return {**found, "fps_rounds": [round(one, 2) for one in fps], "peak_gpu_memory_mb": peak_mb}


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--minutes", default=10.0, help="For all rows; what does not fit is left out, and says so.")
@click.option("--device", default="cuda", help="PyTorch's name; `cpu` tries the command out, slowly.")
@click.option("--size", "sizes", nargs=2, type=int, multiple=True, default=SIZES, help="Lr height and width.")
@click.option("--only", multiple=True, help="Keys of rows; by default all.")
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
def main(minutes: float, device: str, sizes: tuple[Size, ...], only: tuple[str, ...], out: Path) -> None:
    """Measure PyTorch, the targets cuda and tensorrt, and plans, at each size.

    What is not built is left out and says so: `make export TARGET=cuda` and `TARGET=tensorrt` build the
    targets, `python -m export plans` the plans.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    deadline_s = time.monotonic() + 60 * minutes
    known = {row.key: row for row in rows()}
    if unknown := set(only) - set(known):
        raise PerfError(f"expected rows among {', '.join(known)}; found {unknown.pop()!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise PerfError(
            f"expected a GPU that PyTorch {torch.__version__} can use, found none: run this where one is"
        )
    ceilings = in_process(measure_ceilings, device, *((512, 2**24, 3) if device == "cpu" else ()))
    log.info("ceilings: %s", ", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in ceilings.items()))
    result: dict[str, Any] = {
        "kind": "gpu", "name": "gpu", "machine": machine(), "device": device, "ceilings": ceilings,
        "minutes": minutes, "rows": [],
    }  # fmt: skip
    for row in [known[key] for key in known if not only or key in only]:
        for size in sizes:
            found = measured_row(row, size, device, ceilings, deadline_s - time.monotonic())
            result["rows"].append(found)
            path = results.write(out, result)
            log.info("%-32s %dx%d  %s", row.name, *reversed(size), described(found))
    log.info("%s", path)


def described(row: Measured) -> str:
    """One line for whoever watches."""
    if "why" in row:
        return str(row["why"])
    share = (
        f", {median(row['fps_rounds']) / row['bound_fps']:.0%} of the roofline" if row["bound_fps"] else ""
    )
    return f"{median(row['fps_rounds']):.2f} fps{share}"


if __name__ == "__main__":
    main()
