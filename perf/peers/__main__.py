"""``make peers`` and ``make gpu``: ours and the papers' rivals on one device, beside its own ceilings."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track

from perf import results
from perf.clips import Size
from perf.gpu import BYTES, least_seconds, measure_ceilings, measure_plans
from perf.machine import ROOT, Watch, machine
from perf.network import COMPILED, EAGER, ON_GPU, in_process, time_network
from perf.peers import NETWORKS, OURS, PLANNED
from perf.results import Command, PerfError, Row, figure, known

PAPERS_SIZE: Size = (720, 1280)  # of the papers' FLOPs
CEILINGS = {"cpu": (2048, 2**27), "cuda": (8192, 2**30)}  # side of the product, bytes of the copy
PLANS = ("plans FP16", "plans INT8")
LEAST_S = 5.0  # a row is not begun with less time than this

log = logging.getLogger(__name__)


def runtimes(name: str, device: str) -> tuple[str, ...]:
    """What a network is measured in; rivals are not compiled, which takes minutes each."""
    if device == "cpu":
        return (EAGER,)
    rest = tuple(one for one in ON_GPU if one != COMPILED)
    return ON_GPU + PLANS * (name == PLANNED) if name in OURS else rest


def roofline(name: str, runtime: str, size: Size, ceilings: dict[str, float]) -> Row:
    """Work of a frame, and the most frames/s that the ceilings allow it."""
    network, precision = NETWORKS[name], runtime.rpartition(" ")[2]
    layers = network.layers(size)
    found = {"flops": sum(one.flops for one in layers) / network.answers}
    if precision in ceilings:
        found["bytes"] = sum(one.elements for one in layers) * BYTES[precision] / network.answers
        found["bound_fps"] = round(network.answers / least_seconds(layers, precision, ceilings), 2)
    return found


def measure(
    name: str, runtime: str, size: Size, limit_s: float, rounds: int, device: str, left_s: float
) -> Row:
    """Figures of a network in a runtime; where there are none, ``why`` says why."""
    threads = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    try:
        if left_s < LEAST_S:
            raise PerfError("the time of this run was over")
        if runtime in PLANS:
            precision = runtime.rpartition(" ")[2].lower()
            found = in_process(measure_plans, precision, size, rounds, timeout_s=left_s)
        else:
            arguments = (NETWORKS[name], runtime, size, limit_s, rounds, threads, device)
            found = in_process(time_network, *arguments, timeout_s=left_s)
    except PerfError as err:
        return {"size": list(size), "rounds": [], "why": str(err).replace(f"{ROOT}/", "")}
    return dict(found)


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("names", nargs=-1)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--size", nargs=2, type=int, default=(180, 320), help="Lr height and width.")
@click.option(
    "--limit", default=10.0, help="Seconds for one row; what is slower on a CPU gets a smaller frame."
)
@click.option("--rounds", default=5, help="Runs of each network.")
@click.option("--minutes", default=30.0, help="For all rows; what does not fit is left out, and says so.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; default: perf/results.")
@click.option("--quick", is_flag=True, help="Two networks at a toy size; results go to build/perf/quick.")
def main(
    names: tuple[str, ...], device: str, size: Size, limit: float, rounds: int, minutes: float,
    out: Path | None, quick: bool,
) -> None:  # fmt: skip
    """Measure the networks NAMES, or all."""
    if quick:
        names, size, rounds = names or ("MST-GAN, student", "RSDN"), (32, 48), 1
    known(names, NETWORKS, "networks")
    if device == "cuda" and not torch.cuda.is_available():
        raise PerfError(
            f"expected a GPU that PyTorch {torch.__version__} can use, found none: run this where one is"
        )
    deadline_s, out = time.monotonic() + 60 * minutes, out or (results.QUICK if quick else results.FOLDER)
    side, copy_bytes = (256, 2**20) if quick else CEILINGS[device]
    result: dict[str, Any] = {
        "kind": "peers", "name": f"peers_{device}_{size[1]}x{size[0]}", "machine": machine(),
        "size": list(size), "ceilings": in_process(measure_ceilings, device, side, copy_bytes),
        "networks": {}, "rows": [],
    }  # fmt: skip
    for name in names or NETWORKS:
        network = NETWORKS[name]
        counted = {"parameters": network.parameters(), "flops_at_papers_size": network.flops(PAPERS_SIZE)}
        result["networks"][name] = counted
    pairs = [(name, runtime) for name in names or NETWORKS for runtime in runtimes(name, device)]
    for name, runtime in track(pairs, "networks", console=results.console):
        with Watch() as watch:
            left_s = deadline_s - time.monotonic()
            row = measure(name, runtime, size, limit, rounds, device, left_s)
            row |= {"name": name, "runtime": runtime, "others_cores": watch.lap()["others_cores"]}
        result["rows"].append(row | roofline(name, runtime, tuple(row["size"]), result["ceilings"]))
        fps = figure(row, "fps")
        log.info("%s, %s: %s", name, runtime, f"{fps.text(2)} frames/s" if fps else row["why"])
        path = results.write(out, result)
    log.info("%s", path)


if __name__ == "__main__":
    main()
