"""``python -m export evaluate``: score checkpoints on a folder of clips."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export.errors import ExportError
from export.paths import BUILD

if TYPE_CHECKING:
    from export.metrics.psnr_ssim import Channels
    from export.network import MstGan
    from export.training.evaluate import Score

log = logging.getLogger(__name__)

# Imports what it needs when it runs, so that --help needs no torch.


@click.command()
@click.option(
    "--clips", type=click.Path(path_type=Path), required=True,
    help="Folder of videos, or of folders of images, each perhaps with GT beside lr frames.",
)  # fmt: skip
@click.option(
    "--names", "names_file", type=click.Path(path_type=Path, exists=True),
    help="Text file with the names of the clips to score, one a line; by default all.",
)  # fmt: skip
@click.option(
    "--checkpoint", "checkpoints", type=click.Path(path_type=Path), multiple=True,
    help="Weights; the second and later are compared with the first. By default the project's own.",
)  # fmt: skip
@click.option("--degradation", default="bi", help="How lr frames are made: bi, bd, real, or x264-28.")
@click.option("--lr-folder", help="Use the lr frames in this folder beside the truth's, such as BIx4.")
@click.option(
    "--frames", type=click.IntRange(min=2), show_default="all",
    help="Score at most so many frames, from the middle of each clip.",
)  # fmt: skip
@click.option(
    "--border", type=click.IntRange(min=0), default=4, help="Hr pixels a side, left out of PSNR and SSIM."
)
@click.option(
    "--temporal-border", type=click.IntRange(min=0), default=0, help="Frames left out at both ends."
)
@click.option(
    "--channels", type=click.Choice(("y", "rgb")), default="y", help="PSNR and SSIM on luma or RGB."
)
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Folder with the weights of LPIPS (squeeze v0.1)."
)
@click.option("--tof/--no-tof", default=True, help="Flicker, tOF: slow.")
@click.option("--vmaf/--no-vmaf", default=True, help="VMAF.")
@click.option("--one-frame", is_flag=True, help="Also networks on one frame alone; takes their time again.")
@click.option(
    "--log", "logs", type=click.Path(path_type=Path), multiple=True,
    help="log.csv of a training run, to be drawn as curves.",
)  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), default=BUILD / "footage", help="Decoded clips.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=BUILD / "evaluation", help="Tables and pictures."
)
def evaluate(
    clips: Path, names_file: Path | None, checkpoints: tuple[Path, ...], degradation: str,
    lr_folder: str | None, frames: int | None, border: int, temporal_border: int, channels: str,
    weights: Path | None, tof: bool, vmaf: bool, one_frame: bool, logs: tuple[Path, ...], cache: Path,
    out: Path,
) -> None:  # fmt: skip
    """Score checkpoints and bicubic on every frame: tables, their JSON, a picture per clip, training curves.

    The published protocols are options: Vid4 and UDM10 as BasicVSR scores them are --border 0, REDS4 is
    --border 0 --channels rgb, Vid4 as TecoGAN scores it is --border 8 --temporal-border 2.
    """
    import torch
    from rich.progress import Progress

    from export.data.degradations import check_degradation
    from export.data.evaluation_clips import find_sources, load_evaluation_clip
    from export.metrics.collage import CROP
    from export.metrics.lpips import NAME, load_lpips
    from export.metrics.vmaf import PACKAGE, has_vmaf
    from export.training.curves import draw_curves
    from export.training.evaluate import MetricConfig, evaluate_clip

    check_degradation(degradation)
    networks = _load(checkpoints)
    device = next(next(iter(networks.values())).parameters()).device
    if not weights:
        log.warning("%s is left out: pass --weights FOLDER to measure it", NAME)
    if vmaf and not has_vmaf():
        log.warning("VMAF is left out: it needs the package %s (pip install -e .[evaluate])", PACKAGE)
    config = MetricConfig(
        load_lpips(weights).to(device) if weights else None, tof, vmaf and has_vmaf(),
        "rgb" if channels == "rgb" else "y", border, temporal_border, one_frame,
    )  # fmt: skip
    names = names_file.read_text().split() if names_file else None
    sources = find_sources(clips, lr_folder=lr_folder, names=names)
    conditions = {
        "date": date.today().isoformat(),
        "degradation": lr_folder or degradation,
        "border": border, "temporal_border": temporal_border, "channels": channels,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tables = ""
    scores: dict[str, list[Score]] = {name: [] for name in networks}
    with Progress() as progress:
        task = progress.add_task("scoring", total=len(sources) * (len(networks) + 1))
        for source in sources:
            least = max(max(CROP) + 1, 2 * border + 11)  # the collage's detail, SSIM's window
            clip = load_evaluation_clip(source, cache, degradation=degradation, frames=frames, min_side=least)
            found = evaluate_clip(
                networks, clip, config, picture=out / f"{Path(clip.name).stem}.png",
                on_network=lambda: progress.advance(task),
            )  # fmt: skip
            for name, score in found.items():
                scores[name].append(score)
                log.info("%s, %s: %+.2f dB over bicubic", clip.name, name, score.gain_db)
            tables = _write(out, conditions, scores, config.channels)  # what is there survives an interrupt
    if logs:
        draw_curves(logs, out / "curves.png")
    click.echo(tables)


def _write(
    out: Path, conditions: Mapping[str, object], scores: Mapping[str, Sequence[Score]], channels: Channels
) -> str:
    """Write the scores so far as JSON and as tables; returns the tables."""
    from export.training.evaluate import as_json
    from export.training.report import differences, markdown

    found = [{**vars(d), "is_significant": d.is_significant} for d in differences(scores, channels)]
    report = {**conditions, "scores": as_json(scores), "differences": found}
    (out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    tables = markdown(scores, channels)
    (out / "scores.md").write_text(tables + "\n")
    return tables


def _load(checkpoints: tuple[Path, ...]) -> dict[str, MstGan]:
    """Networks by name, on the device."""
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.training.device import find_device

    paths = checkpoints or (DEFAULT,)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
    loaded = (load_checkpoint(path).to(find_device()) for path in paths)
    networks = dict(zip(names, loaded, strict=True))
    if len(networks) < len(paths):
        raise ExportError(f"expected checkpoints of different names, found {', '.join(names)}; rename one")
    return networks
