"""``make ladder``: every rung in turn on this machine, same clip, same client."""

from __future__ import annotations

import logging
import re
import signal
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click

from perf import results
from perf.clip import Size
from perf.errors import Command, PerfError, one_line
from perf.ladder.bench import Bench, spread_percent
from perf.ladder.quality import CLIP, FIRST, TOF_FRAMES, Judge, read_clip
from perf.ladder.rungs import FIRST as FIRST_RUNG
from perf.ladder.rungs import CannotRunError, Rung, chosen
from perf.ladder.table import MEMORY_RUNGS, memory_words
from perf.ladder.weights import cost, find_weights
from perf.machine import ROOT, machine
from perf.points import size_name

WORK = ROOT / "build" / "ladder"
MEASURES = ("ms_per_frame", "fps", "ratio", "peak_memory_mb", "psnr_db", "psnr_loss_db", "ssim", "tof")
MULTIPLE_OF = 4  # both sides of a frame that the networks take
LEAST_FRAMES = 6  # tOF needs so many
MEMORY_SIZES = ((360, 640), (720, 1280))

Row = dict[str, Any]
log = logging.getLogger(__name__)


class Ladder:
    """Measures rungs, and keeps on disk what it has, whatever happens."""

    def __init__(self, bench: Bench, judge: Judge, size: Size, out: Path) -> None:
        self.bench, self.judge, self.size, self.out = bench, judge, size, out
        facts = machine()
        self.facts: dict[str, Any] = {
            "kind": "ladder",
            "name": "ladder",
            "machine": facts,
            "date": facts["date"],
            "commit": facts["commit"],
            "input_size": list(size),
            "clip": {"name": CLIP, "first": FIRST, "frames": len(bench.lr), "tof_frames": TOF_FRAMES},
            "cores": bench.cores,
            "rounds": bench.rounds,
            "least_s": bench.least_s,
        }
        self.rows: list[Row] = []
        self.memory: list[Row] = []
        self.failed: list[str] = []
        self.is_complete = False

    def climb(self, rungs: list[Rung]) -> Path:
        """Measure all, and the first again at the end; a rung that fails leaves the others alone."""
        for rung in rungs:
            log.info("%s", rung.name)
            self.rows.append(self.row(rung))
            self.relate()
            self.save()
            log.info("  %s", described(self.rows[-1]))
        self.repeat_first()
        self.relate()
        self.weigh(rungs)
        self.is_complete = True
        return self.save()

    def row(self, rung: Rung) -> Row:
        """One row; where it cannot be measured, its figures are None and ``why`` says why."""
        row: Row = {"name": rung.name, "key": rung.key, "params": None, "flops": None}
        row |= dict.fromkeys(MEASURES)
        row |= {"instances": rung.instances, "batch": rung.batch, "in_flight": rung.in_flight}
        try:
            row["params"], row["flops"] = cost(rung.widths, self.size)
            rung.check_machine()
            weights = find_weights(rung.widths)
            found = self.bench.run(rung, weights)
            row |= self.judge.scores(found.answers)
        except CannotRunError as err:
            return {**row, "why": str(err)}
        except PerfError as err:
            self.failed.append(f"{rung.name}: {one_line(err)}")
            return {**row, "why": f"failed: {one_line(err)}"}
        row |= {
            "peak_memory_mb": found.peak.processes,
            "fps_rounds": found.fps,
            "checkpoint": weights.name,
        }
        row["others_cores"] = found.peak.others_cores
        if found.peak.gpu is not None:
            row["gpu_memory_mb"] = found.peak.gpu
        if found.bare_fps:
            row["bare_fps_rounds"] = found.bare_fps
            row["serving_cost"] = round(median(found.bare_fps) / median(found.fps) - 1, 4)
        return row

    def repeat_first(self) -> None:
        """Measure the first rung again: what else changed while the others ran, shows in it."""
        first = self.rows[0]
        if "fps_rounds" not in first:
            return
        log.info("%s, again", FIRST_RUNG.name)
        try:
            again = self.bench.run(FIRST_RUNG, find_weights(FIRST_RUNG.widths))
        except PerfError as err:
            self.failed.append(f"{FIRST_RUNG.name}, again: {one_line(err)}")
            return
        first["fps_rounds"] += again.fps
        first["peak_memory_mb"] = max(first["peak_memory_mb"], again.peak.processes)
        first["others_cores"] = max(first["others_cores"], again.peak.others_cores)
        log.info("  from start to end it changed by %.1f %%", spread_percent(first["fps_rounds"]))

    def weigh(self, rungs: list[Rung]) -> None:
        """Peak memory of two served rungs at larger sizes, where what any server takes weighs less."""
        peaks = {row["key"]: row["peak_memory_mb"] for row in self.rows}
        if not all(peaks.get(key) for key in MEMORY_RUNGS):
            return
        self.memory = [{"input_size": list(self.size), **{key: peaks[key] for key in MEMORY_RUNGS}}]
        weighed = [rung for rung in rungs if rung.key in MEMORY_RUNGS]
        for size in (size for size in MEMORY_SIZES if size != self.size):
            self.save()
            found: Row = {"input_size": list(size)}
            for rung in weighed:
                try:
                    found[rung.key] = self.bench.peak_mb(rung, find_weights(rung.widths), size)
                except PerfError as err:
                    self.failed.append(f"{rung.name} at {size_name(size)}: {one_line(err)}")
                    return
            log.info("at %s: %s", size_name(size), memory_words(found))
            self.memory.append(found)

    def relate(self) -> None:
        """Fill in what follows from the rounds, and from the first row."""
        first = self.rows[0]
        for row in self.rows:
            if "fps_rounds" not in row:
                continue
            row["fps"] = round(median(row["fps_rounds"]), 3)
            row["ms_per_frame"] = round(1000 / median(row["fps_rounds"]), 2)
            row["spread_percent"] = spread_percent(row["fps_rounds"])
            if "fps_rounds" in first:
                row["ratio"] = round(median(row["fps_rounds"]) / median(first["fps_rounds"]), 3)
                row["psnr_loss_db"] = round(first["psnr_db"] - row["psnr_db"], 4)

    def save(self) -> Path:
        """Write everything measured so far."""
        state = {"complete": self.is_complete, "failed": self.failed}
        return results.write(self.out, {**self.facts, **state, "rows": self.rows, "memory": self.memory})


def described(row: Row) -> str:
    """One line for whoever watches."""
    if "why" in row:
        return str(row["why"])
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f}x"
    cost = f", serving costs {row['serving_cost']:.1%}" if "serving_cost" in row else ""
    return (
        f"{row['ms_per_frame']:.1f} ms/frame, {row['fps']:.2f} fps{ratio}, {row['peak_memory_mb']:.0f} MB, "
        f"PSNR-Y {row['psnr_db']:.2f} dB, SSIM-Y {row['ssim']:.4f}, tOF {row['tof']:.4f} px{cost}"
    )


def parse_size(ctx: click.Context, parameter: click.Parameter, text: str) -> Size:
    """``WIDTHxHEIGHT`` -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(width, height) < 4 * MULTIPLE_OF or width % MULTIPLE_OF or height % MULTIPLE_OF:
        raise click.BadParameter(
            f"expected WIDTHxHEIGHT in multiples of {MULTIPLE_OF} from {4 * MULTIPLE_OF} on, found {text!r}"
        )
    return height, width


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--rows", help="Keys, comma-separated; by default all. The first is always measured.")
@click.option("--size", default="320x180", callback=parse_size, metavar="WxH", help="Of the lr frames.")
@click.option("--frames", default=16, type=click.IntRange(LEAST_FRAMES), help="Of the clip, each row all.")
@click.option("--rounds", default=2, type=click.IntRange(1), help="Of every served row.")
@click.option("--seconds", default=8.0, help="A round goes on for so long at least.")
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
def main(rows: str | None, size: Size, frames: int, rounds: int, seconds: float, out: Path) -> None:
    """Serve and measure the ladder's rows in turn."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    rungs = chosen(rows)
    WORK.mkdir(parents=True, exist_ok=True)
    lr, truth = read_clip(frames, size)
    ladder = Ladder(Bench(lr, WORK, rounds, seconds), Judge(truth), size, out)
    log.info("%s", ladder.climb(rungs))
    for line in ladder.failed:
        click.echo(f"Error: {line}", err=True)
    if ladder.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
