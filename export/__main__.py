"""``python -m export``: from checkpoint to served model repository, and from footage to checkpoint."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

import click

from export.errors import ExportError

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"


class Commands(click.Group):
    """Prints an expected error as one line and exits with 1; VSR_DEBUG=1 shows where it came from."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except ExportError as err:
            if os.environ.get("VSR_DEBUG"):
                raise
            click.echo(f"Error: {err}", err=True)
            sys.exit(1)


@click.group(cls=Commands, context_settings={"show_default": True})
def main() -> None:
    """Build what the server serves."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("export").setLevel(logging.INFO)


# Subcommands import what they need when they run, so that --help needs neither torch nor onnx.


@main.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights; by default the project's own.")
@click.option("--repository", type=click.Path(path_type=Path), default=ROOT / "model_repository")
@click.option(
    "--build", "folder", type=click.Path(path_type=Path), default=BUILD / "onnx", help="Work folder."
)
@click.option("--target", help="cpu, cuda or fp32; by default what this machine has.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of videos to find INT8 ranges on; by default the sample clips.",
)
@click.option("--speed-gate/--no-speed-gate", default=True, help="Serve a rung only if it is faster here.")
def build(
    checkpoint: Path | None, repository: Path, folder: Path, target: str | None, calibration: Path | None,
    speed_gate: bool,
) -> None:  # fmt: skip
    """Checkpoint -> ONNX -> the target's precision -> parity checks -> model repository."""
    from export import gates, parity
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.onnx_export import export_onnx
    from export.repository import FP32, install, write_configs
    from export.rungs import build_rung, check_target, default_target
    from export.sample import calibration_windows

    target = target or default_target()
    check_target(target)
    windows = calibration_windows(calibration)
    network = load_checkpoint(checkpoint or DEFAULT)
    paths = export_onnx(network, folder)
    parity.check(parity.compare_onnx(network, paths), folder)
    verdicts = build_rung(target, network, paths, folder, windows, judge_speed=speed_gate)
    gates.check(verdicts, folder)
    write_configs(repository)
    promoted = [verdict.rung for verdict in verdicts if verdict.fast_enough]
    install(folder, repository, promoted, served=[FP32, *promoted][-1])
    click.echo(f"{repository} is complete: start a server with `make serve`")


@main.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights; by default the project's own.")
@click.option(
    "--build", "folder", type=click.Path(path_type=Path), default=BUILD / "onnx", help="Folder of a build."
)
@click.option("--out", type=click.Path(path_type=Path), default=BUILD / "plans", help="Where the plans go.")
@click.option(
    "--library", default="tensorrt_rtx", help="tensorrt_rtx needs no GPU; tensorrt builds for the one here."
)
@click.option("--check", is_flag=True, help="Build nothing; refuse plans that no longer fit.")
@click.option(
    "--gpu", "gpus", multiple=True, help="Compute capability, as 8.9; by default all that RTX targets."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Folder of videos, as for build.")
def plans(
    checkpoint: Path | None, folder: Path, out: Path, library: str, gpus: tuple[str, ...],
    calibration: Path | None, check: bool,
) -> None:  # fmt: skip
    """TensorRT plans of every stage, the generator in FP16 and INT8, from what build has exported."""
    from export import gates
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.onnx_export import stage_path
    from export.plan import build_plan, check_plan, load_library, stage_profiles
    from export.rungs import PLANS, build_for_tensorrt, check_parent
    from export.sample import calibration_windows
    from export.spec import STAGES

    load_library(library)
    windows = calibration_windows(calibration)
    stages = {stage.name: stage_path(folder, stage) for stage in STAGES}
    for path in stages.values():
        if not path.is_file():
            raise ExportError(f"expected the FP32 stage at {path}, found none: run `make export` first")
    graphs = out / "onnx"
    if not check:
        network = load_checkpoint(checkpoint or DEFAULT)
        gates.check(build_for_tensorrt(network, stages, graphs, windows), out)
    profiles = {stage.name: stage_profiles(stage) for stage in STAGES}
    for name in PLANS:
        source, plan, stage = graphs / f"{name}.onnx", out / library / f"{name}.plan", name.split(".")[0]
        if not check:
            build_plan(library, source, plan, profiles[stage], gpus)
        check_plan(library, source, plan, profiles[stage], gpus)
        check_parent(source, stages[stage])
        click.echo(f"{plan} fits")


@main.command()
@click.option("--repository", "folder", type=click.Path(path_type=Path), default=ROOT / "model_repository")
def repository(folder: Path) -> None:
    """Regenerate every config.pbtxt from export/spec.py."""
    from export.repository import write_configs

    write_configs(folder)


@main.command()
@click.option("--clips", type=click.Path(path_type=Path), required=True, help="Folder of videos.")
@click.option(
    "--photos", type=click.Path(path_type=Path), help="Folder of still images, to be moved synthetically."
)
@click.option(
    "--validation", type=click.Path(path_type=Path, exists=True), required=True,
    help="Text file naming the clips to hold back and score on, one a line.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Run folder; an existing one is resumed."
)
@click.option("--cache", type=click.Path(path_type=Path), default=BUILD / "footage", help="Decoded footage.")
@click.option("--init", type=click.Path(path_type=Path), help="Checkpoint to start from.")
@click.option(
    "--objective", type=click.Choice(["fidelity", "flow"]), default="fidelity", help="flow: the flow alone."
)
@click.option("--photo-share", default=0.3, help="Of the windows, drawn from photos.")
@click.option("--widths", default="pruned", help="Width table.")
@click.option("--steps", default=20_000)
@click.option("--batch", default=12, help="Windows per step.")
@click.option("--patch", default=192, help="Hr pixels a side.")
@click.option("--lr", default=4e-4, help="Peak learning rate.")
@click.option("--seed", default=0)
@click.option("--bf16/--fp32", default=True, help="Arithmetic of the generator's convolutions.")
@click.option("--validate-every", default=1000, help="Steps between validations; each also saves.")
def train(
    clips: Path, photos: Path | None, validation: Path, out: Path, cache: Path, init: Path | None,
    objective: str, photo_share: float, widths: str, steps: int, batch: int, patch: int, lr: float,
    seed: int, bf16: bool, validate_every: int,
) -> None:  # fmt: skip
    """Train the generator for fidelity; Ctrl-C saves, the same command goes on."""
    from export.checkpoint import load_checkpoint
    from export.network import WIDTHS
    from export.spec import MULTIPLE_OF, SCALE
    from export.training.footage import load_folder
    from export.training.trainer import Trainer, TrainOptions

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped run saves, as with Ctrl-C
    if widths not in WIDTHS:
        raise ExportError(f"expected --widths to be one of {', '.join(WIDTHS)}, found {widths!r}")
    if patch % (SCALE * MULTIPLE_OF):
        raise ExportError(f"expected --patch to be a multiple of {SCALE * MULTIPLE_OF}, found {patch}")
    held_back = validation.read_text().split()
    options = TrainOptions(
        objective=objective, photo_share=photo_share, widths=widths, steps=steps, batch=batch, patch=patch,
        lr=lr, seed=seed, bf16=bf16, validate_every=validate_every,
    )  # fmt: skip
    validation_clips = load_folder(clips, cache, min_side=patch, names=held_back)
    training_clips = [c for c in load_folder(clips, cache, min_side=patch) if c.name not in held_back]
    training_photos = load_folder(photos, cache, min_side=patch, photo=True) if photos else []
    start = load_checkpoint(init) if init else None
    if start and start.widths.name != widths:
        raise ExportError(f"expected --init of the {widths!r} widths, found {start.widths.name!r}")
    Trainer(options, training_clips, training_photos, validation_clips, out, start).run()


@main.command()
@click.option("--clips", type=click.Path(path_type=Path), required=True, help="Folder of videos.")
@click.option(
    "--validation",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Text file naming the clips.",
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights; by default the project's own.")
@click.option("--segments", default=4, help="Per clip, of seven frames each, evenly spread.")
@click.option("--cache", type=click.Path(path_type=Path), default=BUILD / "footage", help="Decoded footage.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=BUILD / "evaluation", help="Tables and pictures."
)
def evaluate(
    clips: Path, validation: Path, checkpoint: Path | None, segments: int, cache: Path, out: Path
) -> None:
    """Score a checkpoint beside bicubic: a table, its JSON, and a picture per clip."""
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.training import evaluation
    from export.training.footage import load_folder
    from export.training.pictures import CROP

    network = load_checkpoint(checkpoint or DEFAULT)
    footage = load_folder(clips, cache, min_side=max(CROP) + 1, names=validation.read_text().split())
    out.mkdir(parents=True, exist_ok=True)
    scores = evaluation.evaluate(network, footage, segments)
    table = evaluation.markdown(scores)
    (out / "scores.md").write_text(table + "\n")
    (out / "scores.json").write_text(json.dumps(evaluation.as_json(scores), indent=2) + "\n")
    for clip in footage:
        evaluation.illustrate(network, clip, out / f"{Path(clip.name).stem}.png")
    click.echo(table)


if __name__ == "__main__":
    main()
