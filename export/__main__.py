"""``python -m export``: from checkpoint to served model repository, and from footage to checkpoint."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from export.errors import ExportError
from export.paths import BUILD, ROOT
from export.training.average import average, interpolate
from export.training.commands import prune, train, train_all
from export.training.evaluate_command import evaluate
from export.training.sequence_commands import evaluate_stream, train_sequences


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
@click.option("--target", help="cpu, cuda, tensorrt or fp32; by default cuda where a GPU is seen, else cpu.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of videos to find INT8 ranges on; by default the sample clips.",
)
@click.option(
    "--speed-gate/--no-speed-gate", default=True, help="Serve a lower precision only if it is faster here."
)
def build(
    checkpoint: Path | None, repository: Path, folder: Path, target: str | None, calibration: Path | None,
    speed_gate: bool,
) -> None:  # fmt: skip
    """Checkpoint -> ONNX -> the target's precision -> parity checks -> model repository."""
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.data.sample import calibration_windows
    from export.model_config import FP16, FP32, INT8, TENSORRT
    from export.onnx.export import export_onnx
    from export.repository import install, install_plans, weights_of, write_configs
    from export.spec import FLOW_ALIGN, GENERATOR
    from export.targets import (
        build_for_tensorrt,
        build_generator,
        build_plans,
        chains_of,
        check_target,
        default_target,
    )
    from export.tensorrt.gpus import compute_capabilities
    from export.tensorrt.plan import identity_path
    from export.verify.compare import Report, compare_plans, compare_stages

    target = target or default_target()
    check_target(target)
    windows = calibration_windows(calibration)
    checkpoint = checkpoint or DEFAULT
    network = load_checkpoint(checkpoint)
    weights = weights_of(checkpoint)
    report = Report(folder)
    paths = export_onnx(network, folder)
    chains = chains_of(target, paths, folder)
    report.check("onnx", compare_stages(network, chains))
    if target != TENSORRT:
        comparisons = build_generator(target, network, paths, folder, windows, timed=speed_gate)
        report.check("precisions", comparisons)
        write_configs(repository)
        selected = [one.precision for one in comparisons if one.fast_enough]
        aligners = [precision for precision in chains if precision != FP32]
        install(folder, repository, weights, {FLOW_ALIGN.name: aligners, GENERATOR.name: selected})
        served = [FP32, *selected][-1]
        click.echo(f"{repository} serves the generator in {served}: start a server with `make serve`")
        return

    graphs = folder / TENSORRT
    report.check("precisions", build_for_tensorrt(network, paths, graphs, windows))
    built = build_plans(TENSORRT, graphs, graphs, paths)
    sources = {name: graphs / f"{name}.onnx" for name in built}
    comparisons = compare_plans(TENSORRT, sources, built, timed=speed_gate)
    report.check("plans", comparisons)
    served = INT8 if all(one.fast_enough for one in comparisons) else FP16
    chosen = {
        name.split(".")[0]: plan for name, plan in built.items() if name.split(".")[1:] in ([], [served])
    }
    write_configs(repository)
    install(folder, repository, weights)  # what GPUs without a plan fall back to, by config.pbtxt
    identities = {model: identity_path(plan) for model, plan in chosen.items()}
    install_plans(chosen, identities, repository, compute_capabilities()[0], weights)
    click.echo(
        f"{repository} holds plans, the generator's in {served}: start a server of the same TensorRT version "
        "with --model-config-name=tensorrt"
    )


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
    from export.checkpoint import DEFAULT, load_checkpoint
    from export.data.sample import calibration_windows
    from export.repository import stage_path
    from export.spec import STAGES
    from export.targets import build_for_tensorrt, build_plans
    from export.tensorrt.plan import load_library
    from export.verify.compare import Report

    load_library(library)
    windows = calibration_windows(calibration)
    stages = {stage.name: stage_path(folder, stage) for stage in STAGES}
    for path in stages.values():
        if not path.is_file():
            raise ExportError(f"expected the FP32 stage at {path}, found none: run `make export` first")
    graphs = out / "onnx"
    if not check:
        network = load_checkpoint(checkpoint or DEFAULT)
        Report(out).check("precisions", build_for_tensorrt(network, stages, graphs, windows))
    for plan in build_plans(library, graphs, out / library, stages, gpus, only_check=check).values():
        click.echo(f"{plan} fits")


@main.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Recurrent network's weights.")
@click.option("--repository", type=click.Path(path_type=Path), default=ROOT / "model_repository")
@click.option(
    "--build", "folder", type=click.Path(path_type=Path), default=BUILD / "stream", help="Work folder."
)
@click.option("--target", type=click.Choice(["cpu", "fp32"]), default="cpu", help="INT8, or FP32.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Folder of videos, as for build.")
def build_stream(
    checkpoint: Path | None, repository: Path, folder: Path, target: str, calibration: Path | None
) -> None:
    """Recurrent checkpoint -> ONNX -> INT8 -> comparison over a sequence -> ensemble mst_gan_stream."""
    from export.checkpoint import DEFAULT_STREAM, load_stream_checkpoint
    from export.data.sample import calibration_windows
    from export.model_config import FP32, INT8
    from export.onnx.stream import convert_for_cpu, export_stream
    from export.repository import install_stream, weights_of
    from export.verify.compare import Report
    from export.verify.sequences import compare_precision, compare_sequence

    checkpoint = checkpoint or DEFAULT_STREAM
    network = load_stream_checkpoint(checkpoint)
    windows = calibration_windows(calibration)
    report = Report(folder)
    paths = export_stream(network, folder)
    report.check("onnx", [compare_sequence(network, paths)])
    precision = FP32
    if target == "cpu":
        served = convert_for_cpu(network, paths, folder, windows)
        report.check("precisions", [compare_precision(INT8, served, paths)])
        precision = INT8
    install_stream(folder, repository, weights_of(checkpoint), precision)
    click.echo(f"{repository} serves mst_gan_stream in {precision}: start a server with `make serve`")


@main.command()
@click.option("--repository", "folder", type=click.Path(path_type=Path), default=ROOT / "model_repository")
def repository(folder: Path) -> None:
    """Regenerate every config.pbtxt from export/spec.py."""
    from export.repository import write_configs

    write_configs(folder)


for command in (train, prune, train_all, average, interpolate, evaluate, train_sequences, evaluate_stream):
    main.add_command(command)

if __name__ == "__main__":
    main()
